"""Every op of ssd.py against loops in float64, with gradients, odd lengths, states and documents; and its memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_h_hf.model import ssd

B, HEADS, DIM, GROUPS, STATE, TAPS = 2, 4, 3, 2, 5, 4


def naive_conv(x, weight, bias, before=None, documents=None):
    """Sum over an explicit window, then SiLU. x (b, l, d), before (b, d, k)."""
    b, length, d = x.shape
    rows = []
    for i in range(b):
        for t in range(length):
            total = torch.zeros(d, dtype=x.dtype) if bias is None else bias
            for back in range(weight.shape[1]):
                tap = weight[:, weight.shape[1] - 1 - back]
                if t - back >= 0:
                    if documents is None or documents[i, t - back] == documents[i, t]:
                        total = total + tap * x[i, t - back]
                elif before is not None and (documents is None or documents[i, 0] == documents[i, t]):
                    total = total + tap * before[i, :, t - back]
            rows.append(total * torch.sigmoid(total))
    return torch.stack(rows).view(b, length, d)


def naive_scan(x, dt, A, B_, C, D, state=None, documents=None):
    """The recurrence, one token and one head at a time."""
    b, length, h, p = x.shape
    per_group = h // B_.shape[2]
    zero = torch.zeros(p, B_.shape[-1], dtype=x.dtype)
    y = [[[None] * h for _ in range(length)] for _ in range(b)]
    last = [[None] * h for _ in range(b)]
    for i in range(b):
        for j in range(h):
            s = zero if state is None else state[i, j]
            for t in range(length):
                if documents is not None and t > 0 and documents[i, t] != documents[i, t - 1]:
                    s = zero
                s = torch.exp(dt[i, t, j] * A[j]) * s + dt[i, t, j] * torch.outer(x[i, t, j], B_[i, t, j // per_group])
                y[i][t][j] = s @ C[i, t, j // per_group] + D[j] * x[i, t, j]
            last[i][j] = s
    stack = lambda rows: torch.stack([torch.stack(row) for row in rows])  # noqa: E731
    return torch.stack([stack(row) for row in y]), stack(last)


def scan_inputs(length, dtype=torch.float64, b=B, h=HEADS, p=DIM, g=GROUPS, n=STATE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "x": random(b, length, h, p).to(dtype),
        "dt": torch.nn.functional.softplus(random(b, length, h) * 3 - 2),
        "A": -torch.exp(random(h)),
        "B": random(b, length, g, n).to(dtype),
        "C": random(b, length, g, n).to(dtype),
        "D": random(h),
        "state": random(b, h, p, n),
    }


def documents_of(length, seed=0):
    """Random non-decreasing document numbers (2, length), numbered from anything."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(B, length, generator=generator) < 0.15).cumsum(1) + 7


def run(op, args, names):
    """Outputs and the gradients of a fixed random projection of them."""
    leaves = {name: args[name].detach().clone().requires_grad_() for name in names}
    outputs = op(**{**args, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    return outputs, torch.autograd.grad(total, list(leaves.values()))


def assert_same(ours, naive, tolerance=1e-10):
    for mine, theirs in zip((*ours[0], *ours[1]), (*naive[0], *naive[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_is_the_recurrence_forward_and_backward(length, with_state, packed):
    args = scan_inputs(length)
    names = list(args) if with_state else [name for name in args if name != "state"]
    documents = documents_of(length) if packed else None

    def ours(x, dt, A, B, C, D, state):
        return ssd.scan(x, dt, A, B, C, D, 8, state if with_state else None, documents)

    def naive(x, dt, A, B, C, D, state):
        return naive_scan(x, dt, A, B, C, D, state if with_state else None, documents)

    assert_same(run(ours, args, names), run(naive, args, names))


@pytest.mark.parametrize("heads, groups", [(2, 2), (1, 1), (6, 2)])
def test_scan_with_few_heads_in_a_group(heads, groups):
    args = scan_inputs(19, h=heads, g=groups)

    def ours(x, dt, A, B, C, D, state):
        return ssd.scan(x, dt, A, B, C, D, 8, state)

    def naive(x, dt, A, B, C, D, state):
        return naive_scan(x, dt, A, B, C, D, state)

    assert_same(run(ours, args, list(args)), run(naive, args, list(args)))


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2500])
@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_a_long_sequence_are_one_recurrence(length, packed, monkeypatch):
    args = scan_inputs(length, b=B, h=2, p=2, g=1, n=2)
    documents = documents_of(length) // 20 if packed else None

    def ours(x, dt, A, B, C, D, state):
        return ssd.scan(x, dt, A, B, C, D, 16, state, documents)

    in_segments = run(ours, args, list(args))
    monkeypatch.setattr(ssd, "SEGMENT_TOKENS", 10**6)
    assert_same(in_segments, run(ours, args, list(args)))
    with torch.no_grad():
        y, state = naive_scan(
            *(args[name][:1, ...] if args[name].dim() > 1 else args[name] for name in args), documents
        )
    torch.testing.assert_close(in_segments[0][0][:1], y)
    torch.testing.assert_close(in_segments[0][1][:1], state)


def test_segments_that_end_where_a_document_ends(monkeypatch):
    monkeypatch.setattr(ssd, "SEGMENT_TOKENS", 8)
    args, documents = scan_inputs(32), torch.arange(32)[None].expand(B, -1) // 8
    y, state = ssd.scan(args["x"], args["dt"], args["A"], args["B"], args["C"], args["D"], 4, args["state"], documents)
    expected = naive_scan(*args.values(), documents)
    torch.testing.assert_close((y, state), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
def test_chunk_size_changes_nothing(chunk_size):
    args = scan_inputs(23)
    y, state = ssd.scan(*(args[k] for k in ("x", "dt", "A", "B", "C", "D")), chunk_size, args["state"])
    torch.testing.assert_close((y, state), naive_scan(*args.values()))


def test_extreme_step_sizes_stay_finite():
    args = scan_inputs(40)
    args["dt"] = torch.where(torch.rand(args["dt"].shape) < 0.5, 1e-12, 500.0).double()
    leaves = [args[name].requires_grad_() for name in args]
    y, state = ssd.scan(*leaves[:6], 8, leaves[6])
    torch.testing.assert_close((y, state), naive_scan(*leaves))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum() + state.sum(), leaves))


def test_step_by_step_is_the_scan():
    args = scan_inputs(9)
    y, last = naive_scan(*args.values())
    state = args["state"]
    for t in range(9):
        row, state = ssd.scan_step(
            args["x"][:, t], args["dt"][:, t], args["A"], args["B"][:, t], args["C"][:, t], args["D"], state
        )
        torch.testing.assert_close(row, y[:, t])
    torch.testing.assert_close(state, last)
    torch.testing.assert_close(ssd.final_state(args["x"], args["dt"], args["A"], args["B"], args["state"]), last)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 17, 2 * ssd.CONV_TOKENS + 2])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_conv_is_a_window_sum_forward_and_backward(length, with_state, packed, with_bias):
    torch.manual_seed(length)
    args = {
        "x": torch.randn(B, length, 6, dtype=torch.float64),
        "weight": torch.randn(6, TAPS, dtype=torch.float64),
        "bias": torch.randn(6, dtype=torch.float64),
        "state": torch.randn(B, 6, TAPS, dtype=torch.float64),
    }
    documents = documents_of(length, seed=length) if packed else None
    used = [name for name, there in zip(args, (True, True, with_bias, with_state and length > 0)) if there]

    def ours(x, weight, bias, state):
        return ssd.causal_conv(x, weight, bias if with_bias else None, state if with_state else None, documents)

    def naive(x, weight, bias, state):
        return naive_conv(x, weight, bias if with_bias else None, state if with_state else None, documents)

    assert_same(run(ours, args, used), run(naive, args, used))


def test_gradients_of_taps_are_summed_in_fp32():
    """A sum over many tokens in bf16 would stop growing; the result is within a few roundings of float64's."""
    torch.manual_seed(0)
    x, weight, bias = torch.rand(1, 4096, 6) + 0.5, torch.rand(6, TAPS), torch.rand(6)
    low = [t.bfloat16().requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in low]
    gradients = torch.autograd.grad(ssd.causal_conv(*low).float().sum(), low)
    expected = torch.autograd.grad(ssd.causal_conv(*exact).sum(), exact)
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-6, atol=0)


def test_conv_steps_and_windows_continue_the_convolution():
    x = torch.randn(B, 11, 6, dtype=torch.float64)
    weight, bias = torch.randn(6, TAPS, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    full = naive_conv(x, weight, bias)
    for split in range(1, 10):
        state = ssd.conv_window(x[:, :split], TAPS, None, None)
        torch.testing.assert_close(ssd.causal_conv(x[:, split:], weight, bias, state), full[:, split:])
        for t in range(split, 11):
            row, state = ssd.conv_step(x[:, t], state, weight, bias)
            torch.testing.assert_close(row, full[:, t])
        torch.testing.assert_close(state, ssd.conv_window(x, TAPS, None, None))


def test_conv_window_of_rows_with_lengths():
    x, before = torch.randn(5, 6, 2), torch.randn(5, 2, TAPS)
    lengths = torch.tensor([0, 1, 3, 4, 6])
    window = ssd.conv_window(x, TAPS, before, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = torch.cat([before[row].T, x[row, :length]])[-TAPS:].T
        assert torch.equal(window[row], expected)
    assert torch.equal(ssd.conv_window(x, TAPS, before, None)[2], x[2, -TAPS:].T)
    assert torch.equal(ssd.conv_window(x[:, :1], TAPS, None, None)[..., :-1], torch.zeros(5, 2, TAPS - 1))


def test_gated_norm_against_loops_with_gradients():
    args = {
        "x": torch.randn(B, 3, 12, dtype=torch.float64),
        "gate": torch.randn(B, 3, 12, dtype=torch.float64),
        "weight": torch.randn(12, dtype=torch.float64),
    }

    def naive(x, gate, weight):
        rows = []
        for value, door in zip(x.reshape(-1, 12), gate.reshape(-1, 12)):
            gated = [v * d / (1 + torch.exp(-d)) for v, d in zip(value, door)]
            for start in range(0, 12, 4):
                size = sum(v * v for v in gated[start : start + 4]) / 4
                rows += [gated[start + i] / torch.sqrt(size + 1e-5) * weight[start + i] for i in range(4)]
        return torch.stack(rows).view(x.shape)

    ours = run(lambda x, gate, weight: ssd.gated_norm(x, gate, weight, 4, 1e-5), args, list(args))
    assert_same(ours, run(naive, args, list(args)))


def test_discretize_honours_its_limit():
    dt, bias = torch.randn(50, 4, dtype=torch.float64) * 4, torch.tensor([-9.0, 0.0, 1.0, 30.0]).double()
    steps = [[math.log1p(math.exp(v + b)) for v, b in zip(row, bias.tolist())] for row in dt.tolist()]
    expected = torch.tensor(steps, dtype=torch.float64)
    torch.testing.assert_close(ssd.discretize(dt, bias, (0.0, math.inf)), expected)
    torch.testing.assert_close(ssd.discretize(dt, bias, (0.01, 0.5)), expected.clamp(0.01, 0.5))
    assert expected.min() < 1e-3 and expected.max() > 20


def test_low_precision_inputs_are_computed_in_fp32():
    args = scan_inputs(40, dtype=torch.bfloat16)
    wide = {name: t.double() for name, t in args.items()}
    fp32 = [args[k] if args[k].dtype == torch.bfloat16 else args[k].float() for k in args]
    y, state = ssd.scan(*fp32[:6], 8, fp32[6])
    assert y.dtype == state.dtype == torch.float32
    expected = naive_scan(*wide.values())
    torch.testing.assert_close((y.double(), state.double()), expected, rtol=1e-4, atol=1e-4)
    bias = torch.tensor([-7.0], dtype=torch.bfloat16)
    step = ssd.discretize(torch.tensor([[-1.0]], dtype=torch.bfloat16), bias, (0.0, math.inf))
    assert step.dtype == torch.float32 and abs(step.item() / math.log1p(math.exp(-8)) - 1) < 1e-6
    gate = torch.randn(3, 8).bfloat16()
    assert ssd.gated_norm(torch.randn(3, 8), gate, torch.ones(8), 4, 1e-5).dtype == torch.bfloat16


def test_autocast_does_not_lower_the_recurrence():
    """Mixed-precision training lowers the projections around it, not the products inside."""
    x, dt, A, B_, C, D, state = (t.float() for t in scan_inputs(70).values())
    step = (x[:, 0], dt[:, 0], A, B_[:, 0], C[:, 0], D, state)
    plain, stepped = ssd.scan(x, dt, A, B_, C, D, 16, state), ssd.scan_step(*step)
    replayed = ssd.final_state(x, dt, A, B_, state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssd.scan(x, dt, A, B_, C, D, 16, state)[0], plain[0])
        assert torch.equal(ssd.scan_step(*step)[0], stepped[0])
        assert torch.equal(ssd.final_state(x, dt, A, B_, state), replayed)


def test_float64_stays_float64():
    args = scan_inputs(20)
    y, state = ssd.scan(*(args[k] for k in ("x", "dt", "A", "B", "C", "D")), 8)
    assert y.dtype == state.dtype == torch.float64
    assert ssd.discretize(args["dt"], args["D"], (0.0, math.inf)).dtype == torch.float64


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("training", [False, True])
def test_no_tensor_of_length_by_chunk_by_heads(training):
    length, heads, chunk = 8192, 16, 64
    args = scan_inputs(length, dtype=torch.float32, b=1, h=heads, p=2, g=2, n=4)
    tensors = [args[k].float().requires_grad_(training) for k in ("x", "dt", "A", "B", "C", "D")]
    with LargestTensor() as largest:
        y, _ = ssd.scan(*tensors, chunk)
        if training:
            y.square().sum().backward()
    inputs = max(t.numel() for t in tensors)
    segment = ssd.SEGMENT_TOKENS * chunk * heads
    assert inputs < largest.numel <= segment < length * chunk * heads / 4


def test_what_the_backward_pass_keeps_does_not_grow_with_chunk_times_length():
    """Kept for the backward pass: inputs, outputs and a state per segment, not the (chunk, chunk, heads) matrices."""
    args = scan_inputs(4096, dtype=torch.float32, b=1, h=8, p=4, g=2, n=4)
    tensors = [args[k].float().requires_grad_() for k in ("x", "dt", "A", "B", "C", "D")]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ssd.scan(*tensors, 128)
    assert sum(kept.values()) < 4 * sum(t.nbytes for t in tensors)
