"""triton_*.py in Triton's interpreter: each kernel against ssd.py in float64, the whole model against the plain path.

The first few tests need no Triton and run everywhere. The rest, marked `kernels`, run on CPU tensors in the interpreter
(`make test-kernels`), or compiled on a GPU (`make test-gpu`). The interpreter multiplies bfloat16 in fp32, as NumPy has
no bfloat16; each element costs Python time there, so shapes are as small as a case allows.
"""

import importlib.util
import os
import sys

import gpu_check
import pytest
import reference
import torch
from decode_step import exact_step, step_operands
from tiny import prompt, tiny_config, tiny_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nemotron_h_hf import HybridCache, NemotronHForCausalLM
from nemotron_h_hf.model import kernels, ssd
from nemotron_h_hf.model.blocks import NemotronHRMSNorm
from nemotron_h_hf.model.moe import squared_relu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
RUNS = importlib.util.find_spec("triton") is not None and (INTERPRETED or DEVICE == "cuda")
needs_triton = pytest.mark.skipif(not RUNS, reason="needs Triton, on a GPU or interpreted: `make test-kernels`")
# Largest difference as a share of the largest value. Three TF32 products make one of fp32 on a GPU.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def error(ours: Tensor, expected: Tensor) -> float:
    ours, expected = ours.detach().cpu().double(), expected.detach().cpu().double()
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def compare(op: str, inputs: list[Tensor | None], rest: tuple = ()) -> None:
    """Outputs and gradients of every input of `kernels.op(*inputs, *rest)` against `ssd.op` on float64 copies."""
    dtype = inputs[0].dtype
    leaves = [None if t is None else t.detach().to(DEVICE).requires_grad_() for t in inputs]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    moved = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in rest]
    out, want = getattr(kernels, op)(*leaves, *moved, "triton"), getattr(ssd, op)(*wide, *rest)
    out, want = (t if isinstance(t, tuple) else (t,) for t in (out, want))
    seeds = [torch.randn(t.shape, generator=torch.Generator().manual_seed(7)) for t in want]
    given, expected = [t for t in leaves if t is not None], [t for t in wide if t is not None]
    total = sum((o.float().cpu() * s).sum() for o, s in zip(out, seeds, strict=True))
    found = torch.autograd.grad(total, given)
    wanted = torch.autograd.grad(sum((o * s).sum() for o, s in zip(want, seeds, strict=True)), expected)
    errors = [error(o, w) for o, w in zip([*out, *found], [*want, *wanted], strict=True)]
    print("errors of outputs and gradients:", " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) <= TOLERANCE[dtype]


def documents(batch: int, length: int, starts: list[tuple[int, int]]) -> Tensor | None:
    """(b, l) document numbers; `starts` are (row, place) where one begins. The first has any number."""
    if not starts:
        return None
    begins = torch.zeros(batch, length, dtype=torch.long)
    for row, place in starts:
        begins[row, place] = 1
    return begins.cumsum(1) + 3


def operands(
    length: int, batch: int = 1, heads: int = 2, groups: int = 1, p: int = 8, n: int = 16,
    dtype: torch.dtype = torch.float32, state: bool = True,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Inputs of the scan; x, B and C are views of one tensor, as in the model."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fed = normal(batch, length, heads * p + 2 * groups * n).to(dtype)
    x, B, C = fed.split([heads * p, groups * n, groups * n], dim=-1)
    return {
        "x": x.unflatten(-1, (heads, p)), "dt": torch.rand(batch, length, heads, generator=generator),
        "A": -4 * torch.rand(heads, generator=generator), "B": B.unflatten(-1, (groups, n)),
        "C": C.unflatten(-1, (groups, n)), "D": normal(heads),
        "state": normal(batch, heads, p, n) if state else None,
    }  # fmt: skip


# The switch


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


def test_without_triton_the_switch_says_what_is_missing(no_triton):
    model = tiny_model("attention_free")
    with pytest.raises(ImportError, match="mamba_implementation='triton' needs triton, which comes with PyTorch"):
        model.set_mamba_implementation("triton")
    assert model.config.mamba_implementation == "auto"
    with pytest.raises(ImportError, match="needs triton"):
        NemotronHForCausalLM(tiny_config("attention_free", mamba_implementation="triton"))


def test_on_a_cpu_it_refuses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "check_implementation", lambda implementation: None)
    values = operands(5)
    with pytest.raises(RuntimeError, match="run on CUDA tensors, this one is on cpu; 'torch' runs such calls"):
        kernels.scan(*(values[name] for name in ("x", "dt", "A", "B", "C", "D")), 16, None, None, "triton")


def test_auto_never_takes_them(monkeypatch):
    for module in [name for name in sys.modules if ".model.triton_" in name]:
        monkeypatch.delitem(sys.modules, module)
    model, cache = tiny_model("attention_free"), None
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
        model(prompt()[:, :1], past_key_values=cache)
    assert not [name for name in sys.modules if ".model.triton_" in name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_check_says_that_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path / "result.json")])
    assert gpu_check.main() == 2
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())


@needs_triton
@pytest.mark.kernels
def test_steps_refuse_gradients_and_float64():
    values = operands(1)
    step = [
        values[name] if name in ("A", "D", "state") else values[name][:, 0] for name in "x dt A B C D state".split()
    ]
    step = [t.to(DEVICE) for t in step]
    with pytest.raises(RuntimeError, match="has no backward pass"):
        kernels.scan_step(*[step[0].requires_grad_(), *step[1:]], "triton")
    with pytest.raises(RuntimeError, match="no kernels for torch.float64"):
        kernels.gated_norm(*(torch.ones(1, 8, dtype=torch.float64, device=DEVICE),) * 3, 8, 1e-5, "triton")


# The scan

SCANS = {
    "one token": {"length": 1},
    "two groups, two rows": {"length": 19, "batch": 2, "heads": 4, "groups": 2},
    "no state": {"length": 16, "state": False},
    "a chunk and one": {"length": 17},
    "documents and state": {"length": 35, "starts": [(0, 5), (0, 16), (0, 33)]},
    "a document per token, two rows": {"length": 18, "batch": 2, "starts": [(1, place) for place in range(1, 18)]},
    "padding": {"length": 20, "padding": 7},
    "odd widths": {"length": 20, "p": 20, "n": 24, "chunk": 12},
    "wide state": {"length": 18, "n": 136, "heads": 1},
    "bfloat16": {"length": 21, "dtype": torch.bfloat16},
    "float16": {"length": 21, "dtype": torch.float16},
    "chunk beyond the length": {"length": 9, "chunk": 100},
}


def scan_case(length: int, chunk: int = 16, padding: int = 0, starts: list | None = None, **sizes) -> None:
    values = operands(length, **sizes)
    if padding:
        values["dt"][:, -padding:] = 0
    state, seq_idx = values["state"], documents(values["x"].shape[0], length, starts or [])
    inputs = [values[name] for name in ("x", "dt", "A", "B", "C", "D")]

    # chunk_size stands between D and the state in the signature
    def ours(x, dt, A, B, C, D, state, seq_idx, implementation):
        return kernels.scan(x, dt, A, B, C, D, chunk, state, seq_idx, implementation)

    def plain(x, dt, A, B, C, D, state, seq_idx):
        return ssd.scan(x, dt, A, B, C, D, chunk, state, seq_idx)

    compare_with(ours, plain, [*inputs, state], (seq_idx,))


def compare_with(ours, plain, inputs: list[Tensor | None], rest: tuple) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "case", ours, raising=False)
        patch.setattr(ssd, "case", plain, raising=False)
        compare("case", inputs, rest)


@needs_triton
@pytest.mark.kernels
@pytest.mark.parametrize("case", SCANS)
def test_scan(case):
    scan_case(**SCANS[case])


@needs_triton
@pytest.mark.kernels
@pytest.mark.parametrize("starts", [[], [(0, 1), (0, 40), (0, 100), (0, 128)]], ids=["one document", "documents"])
@torch.no_grad()
def test_scan_at_every_length(starts):
    """1 to 200 on a GPU, in the interpreter some around each edge; forward, where a program has a part of a chunk.

    Gradients are in SCANS.
    """
    values = operands(200, heads=1)
    inputs = {name: values[name].to(DEVICE) for name in ("x", "dt", "A", "B", "C", "D", "state")}
    args = [values[name].double() for name in ("x", "dt", "A", "B", "C", "D")]
    seq_idx = documents(1, 200, starts)
    expected, _ = ssd.scan(*args, 16, values["state"].double(), seq_idx)
    lengths = range(1, 201) if DEVICE == "cuda" else [2, 3, 7, 15, 16, 17, 31, 32, 33, 50, 64, 97, 128, 129, 200]
    for length in lengths:
        part = {name: t[:, :length] if name in ("x", "dt", "B", "C") else t for name, t in inputs.items()}
        rows = None if seq_idx is None else seq_idx[:, :length]
        on_device = None if rows is None else rows.to(DEVICE)
        y, last = kernels.scan(*list(part.values())[:6], 128, part["state"], on_device, "triton")
        assert error(y, expected[:, :length]) <= 1e-5, length
        short = [t[:, :length] if t.dim() > 1 else t for t in args]
        assert error(last, ssd.scan(*short, 16, values["state"].double(), rows)[1]) <= 1e-5, length


@needs_triton
@pytest.mark.kernels
def test_gradients_where_decays_are_strong_and_weak():
    """da is a difference of sums: steps of 1e-4 to 30 in one chunk must not cost the small ones their digits."""
    values = operands(16, heads=1)
    values["dt"] = torch.logspace(-4, 1.5, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))][
        None, :, None
    ]
    inputs = [values[name] for name in ("x", "dt", "A", "B", "C", "D", "state")]
    leaves = [t.to(DEVICE).requires_grad_() for t in inputs]
    y, _ = kernels.scan(*leaves[:6], 16, leaves[6], None, "triton")
    wide = [t.double().requires_grad_() for t in inputs]
    want, _ = ssd.scan(*wide[:6], 16, wide[6])
    seed = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((y.cpu() * seed).sum(), leaves[1])
    (wanted,) = torch.autograd.grad((want * seed).sum(), wide[1])
    scale = wanted.abs().clamp(min=wanted.abs().median())
    assert ((found.cpu() - wanted).abs() / scale).max() <= 1e-4


# Convolution, norm, steps

CONVS = {
    "one token": {"length": 1},
    "state": {"length": 11, "batch": 2, "state": True},
    "documents and state": {"length": 11, "batch": 2, "state": True, "starts": [(0, 1), (0, 5), (1, 2)]},
    "documents": {"length": 12, "starts": [(0, 4), (0, 5)]},
    "three taps, no bias": {"length": 9, "taps": 3, "bias": False},
    "two taps, state": {"length": 9, "taps": 2, "state": True},
    "three taps, documents and state": {"length": 9, "taps": 3, "state": True, "starts": [(0, 1), (0, 3), (0, 4)]},
    "two blocks of channels, four parts": {
        "length": 50,
        "batch": 2,
        "channels": 259,
        "state": True,
        "starts": [(0, 17)],
    },
    "shorter than the taps": {"length": 2, "state": True},
    "tokens that fill a part": {"length": 16, "state": True},
    "bfloat16": {"length": 11, "dtype": torch.bfloat16, "state": True},
    "float16": {"length": 19, "dtype": torch.float16, "starts": [(0, 16)]},
}


@needs_triton
@pytest.mark.kernels
@pytest.mark.parametrize("case", CONVS)
def test_causal_conv(case):
    chosen = {"batch": 1, "channels": 10, "taps": 4, "bias": True, "state": False, "starts": [], "dtype": torch.float32}
    chosen |= CONVS[case]
    batch, channels, length = chosen["batch"], chosen["channels"], chosen["length"]
    x = torch.randn(batch, length, channels + 5).to(chosen["dtype"])[
        ..., 3 : 3 + channels
    ]  # a view, as of in_proj's output
    weight, bias = torch.randn(channels, chosen["taps"]), torch.randn(channels) if chosen["bias"] else None
    state = torch.randn(batch, channels, chosen["taps"]) if chosen["state"] else None
    compare("causal_conv", [x, weight, bias, state], (documents(batch, length, chosen["starts"]),))


@needs_triton
@pytest.mark.kernels
def test_causal_conv_of_rows_in_any_order():
    """Tokens before rows in memory, and a document that continues after another one."""
    x, weight, bias = torch.randn(13, 2, 9).transpose(0, 1), torch.randn(9, 4), torch.randn(9)
    seq_idx = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 2, 2, 2, 0, 0, 2], [5] * 13])
    compare("causal_conv", [x, weight, bias, torch.randn(2, 9, 4)], (seq_idx,))


@needs_triton
@pytest.mark.kernels
def test_more_taps_are_pytorchs_unless_ours_are_asked_for():
    x, weight = torch.randn(1, 7, 3, device=DEVICE), torch.randn(3, 5, device=DEVICE)
    expected = ssd.causal_conv(x.double(), weight.double(), None)
    assert error(kernels.causal_conv(x, weight, None, None, None, "auto"), expected) <= 1e-5
    with pytest.raises(RuntimeError, match="takes 2 to 4 taps, conv_kernel=5; 'torch' runs such calls"):
        kernels.causal_conv(x, weight, None, None, None, "triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_that_are_one_kernel_on_a_gpu(dtype):
    """RMSNorm and squared ReLU as the model calls them, gradients too, against float64."""
    norm = NemotronHRMSNorm(96, 1e-5).to("cuda", dtype)
    x = torch.randn(5, 96, device="cuda", dtype=dtype, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    scale = (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    for ours, want in ((norm(x), wide * scale), (squared_relu(x, "triton"), torch.relu(wide).square())):
        found, wanted = torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(want.sum(), wide)[0]
        assert ours.dtype == dtype and max(error(ours, want), error(found, wanted)) <= TOLERANCE[dtype]


@needs_triton
@pytest.mark.kernels
def test_long_walks():
    """Programs that walk over many steps, and a part of the backward pass that has only tokens after the last."""
    from nemotron_h_hf.model import triton_conv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_conv, "WALK", (48, 48))
        compare(
            "causal_conv", [torch.randn(1, 96, 5), torch.randn(5, 4), torch.randn(5), torch.randn(1, 5, 4)], (None,)
        )


@needs_triton
@pytest.mark.kernels
def test_causal_conv_can_be_derived_twice():
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, 6, 3), (3, 4), (3,), (1, 3, 4))]
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1]])

    def second(op, leaves: list[Tensor], *rest) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in leaves]
        first = torch.autograd.grad(op(*leaves, seq_idx.to(leaves[0].device), *rest).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found = second(kernels.causal_conv, [t.to(DEVICE, copy=True) for t in inputs], "triton")
    wanted = second(ssd.causal_conv, [t.double() for t in inputs])
    assert max(error(f, w) for f, w in zip(found, wanted, strict=True)) <= 1e-5


@needs_triton
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 2048)])
def test_squared_relu(shape, dtype):
    """In fp32 bit by bit PyTorch's; also of a view. (The interpreter cuts bfloat16 off.)"""
    from nemotron_h_hf.model import triton_relu2

    both = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype).to(DEVICE)
    x = both[..., : shape[-1]].detach().requires_grad_()
    wide, seed = x.detach().double().requires_grad_(), torch.randn(shape).to(dtype).to(DEVICE)
    ours, want = triton_relu2.squared_relu(x), torch.relu(wide).square()
    found, wanted = torch.autograd.grad(ours, x, seed)[0], torch.autograd.grad(want, wide, seed.double())[0]
    assert ours.dtype == found.dtype == dtype and ours.shape == found.shape == x.shape
    assert max(error(ours, want), error(found, wanted)) <= TOLERANCE[dtype]
    if dtype == torch.float32:
        assert torch.equal(ours, torch.relu(x) * torch.relu(x))


@needs_triton
@pytest.mark.kernels
def test_squared_relu_can_be_derived_twice():
    from nemotron_h_hf.model import triton_relu2

    x = torch.tensor([-1.0, 3.0], device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(triton_relu2.squared_relu(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].tolist() == [0.0, 2.0]


@needs_triton
@pytest.mark.kernels
def test_squared_relu_of_no_number():
    from nemotron_h_hf.model import triton_relu2

    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e30], device=DEVICE)
    assert torch.equal(triton_relu2.squared_relu(x).nan_to_num(7.0), torch.relu(x).square().nan_to_num(7.0))


@needs_triton
@pytest.mark.kernels
@torch.no_grad()
def test_causal_conv_at_every_length():
    x, weight, bias = torch.randn(1, 200, 6), torch.randn(6, 4), torch.randn(6)
    expected = ssd.causal_conv(x.double(), weight.double(), bias.double())
    for length in [*range(1, 201, 1 if DEVICE == "cuda" else 23), 63, 64, 65, 128, 129]:
        ours = kernels.causal_conv(
            x[:, :length].to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), None, None, "triton"
        )  # fmt: skip
        assert error(ours, expected[:, :length]) <= 1e-6, length


@needs_triton
@pytest.mark.kernels
@pytest.mark.parametrize("shape,group", [((2, 9, 96), 24), ((3, 40), 40), ((20, 6), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norm(shape, group, dtype):
    x, both = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], shape[-1] + 5).to(dtype)
    compare("gated_norm", [x, both[..., : shape[-1]], torch.rand(shape[-1]) + 0.5], (group, 1e-5))


@needs_triton
@pytest.mark.kernels
@pytest.mark.parametrize("dtype,state_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
@torch.no_grad()
def test_conv_step(dtype, state_dtype):
    from nemotron_h_hf.model import triton_conv

    x, state = torch.randn(3, 24).to(dtype), torch.randn(3, 24, 4).to(state_dtype)
    weight, bias = torch.randn(24, 4), torch.randn(24)
    want, want_after = ssd.conv_step(x.double(), state.double(), weight.double(), bias.double())
    x, weight, bias = (t.to(DEVICE) for t in (x, weight, bias))
    held = state.to(DEVICE, copy=True)
    out, after = kernels.conv_step(x, held, weight, bias, "triton")
    assert error(out, want) <= TOLERANCE[dtype] and torch.equal(after.cpu().double(), want_after)
    assert torch.equal(held.cpu(), state)  # as in ssd.py, unless asked for
    out, after = triton_conv.conv_step(x, held, weight, bias, in_place=True)
    assert after is held and error(out, want) <= TOLERANCE[dtype] and torch.equal(held.cpu().double(), want_after)


@needs_triton
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_scan_step(dtype):
    values = operands(1, batch=3, heads=4, groups=2, p=20, n=24, dtype=dtype)
    step = [
        values[name] if name in ("A", "D", "state") else values[name][:, 0] for name in "x dt A B C D state".split()
    ]
    want_y, want_state = ssd.scan_step(*(t.double() for t in step))
    held = [t.to(DEVICE, copy=True) for t in step]
    y, state = kernels.scan_step(*held, "triton")
    assert y.dtype == dtype and state is held[-1]
    assert error(y, want_y) <= TOLERANCE[dtype] and error(state, want_state) <= 1e-6


@needs_triton
@pytest.mark.kernels
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.01, 0.5)])
@torch.no_grad()
def test_the_fused_step(limit):
    given = step_operands(b=2, h=4, p=20, g=2, n=24)
    before = given["states"][1].clone()
    want, want_conv, want_ssm = exact_step(**given, limit=limit)
    given = tree_map_only(Tensor, lambda t: t.to(DEVICE, copy=True), given)
    out, held = kernels.whole_step(**given, limit=limit, implementation="triton"), given["states"]
    errors = error(out, want), error(held[0], want_conv), error(held[1], want_ssm)
    print("output, window, state:", *(f"{e:.1e}" for e in errors))
    assert max(errors) <= 1e-5
    smallest, want_smallest = held[1][:, 0].cpu().double() - before[:, 0], want_ssm[:, 0] - before[:, 0]
    assert error(smallest, want_smallest) <= 2e-2  # of steps of 1e-5; 1e-7 of the state is what fp32 leaves of it


# The whole model


def small_model(**overrides) -> nn.Module:
    small = {"hybrid_override_pattern": "M*-M", "mamba_num_heads": 4, "chunk_size": 16}
    return tiny_model(**{**small, **overrides}).to(DEVICE)


@needs_triton
@pytest.mark.kernels
def test_logits_and_gradients_of_a_model():
    model, ids = small_model().train(), prompt(1, 19).to(DEVICE)

    def outcome(implementation: str) -> dict[str, Tensor]:
        model.set_mamba_implementation(implementation)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return {"logits": output.logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    ours, plain = outcome("triton"), outcome("torch")
    model.double()
    want = outcome("torch")
    errors = {name: (error(ours[name], want[name]), error(plain[name], want[name])) for name in want}
    print("triton, torch:", *(f"{max(column):.1e}" for column in zip(*errors.values())))
    assert max(mine for mine, _ in errors.values()) <= 2e-5


@needs_triton
@pytest.mark.kernels
@torch.no_grad()
def test_logits_against_the_reference():
    model, ids = small_model(), prompt(1, 11)
    model.set_mamba_implementation("triton")
    want = reference.reference_logits({k: v.cpu() for k, v in model.state_dict().items()}, model.config, ids[0])
    assert error(model(ids.to(DEVICE)).logits[0], want) <= 1e-5


@needs_triton
@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_padded_prefill_then_a_part_then_steps(recorded, monkeypatch):
    """Recorded steps run op by op, others fused; both can continue from either's states."""
    model, ids, mask = small_model(), prompt(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    fused: list[int] = []
    whole_step = kernels.whole_step
    monkeypatch.setattr("nemotron_h_hf.model.mamba2.whole_step", lambda *a: (fused.append(1), whole_step(*a))[1])

    def logits(implementation: str) -> Tensor:
        model.set_mamba_implementation(implementation)
        cache, parts = HybridCache(model.config), []
        if recorded:
            cache.activate_past_recording()
        for start, end in ((0, 11), (11, 21), (21, 22), (22, 23), (23, 24)):
            fed = {"input_ids": ids[:, start:end].to(DEVICE), "attention_mask": mask[:, :end].to(DEVICE)}
            parts.append(model(**fed, past_key_values=cache).logits)
        if recorded:
            cache.crop(-2)
            fed = {"input_ids": ids[:, 22:23].to(DEVICE), "attention_mask": mask[:, :23].to(DEVICE)}
            parts.append(model(**fed, past_key_values=cache).logits)
        return torch.cat(parts, dim=1).cpu()

    ours, want = logits("triton"), logits("torch")
    real = torch.cat([mask, mask[:, 22:23]], dim=1).bool() if recorded else mask.bool()
    assert error(ours[real], want[real]) <= 1e-5
    assert len(fused) == (0 if recorded else 3 * 2)  # three steps of two Mamba layers


@needs_triton
@pytest.mark.kernels
@torch.no_grad()
def test_packed_rows():
    model, lengths = small_model(), [7, 3, 13]
    parts = [prompt(1, length, seed=length).to(DEVICE) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(DEVICE)
    model.set_mamba_implementation("triton")
    ours = model(torch.cat(parts, dim=1), position_ids=positions).logits
    model.set_mamba_implementation("torch")
    alone = torch.cat([model(ids).logits for ids in parts], dim=1)
    assert error(ours, alone) <= 1e-5


@needs_triton
@pytest.mark.kernels
@torch.no_grad()
def test_generation_under_a_hook_or_in_pieces():
    """A hook on the norm must see its calls, so such a layer's steps are not fused."""
    model, ids = small_model(), prompt(1, 9).to(DEVICE)
    model.set_mamba_implementation("triton")
    seen: list[int] = []
    model.model.layers[0].mixer.norm.register_forward_hook(lambda *_: seen.append(1))
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    ours = model.generate(ids, **settings)
    assert len(seen) == 3
    model.set_mamba_implementation("torch")
    assert torch.equal(ours, model.generate(ids, **settings))
