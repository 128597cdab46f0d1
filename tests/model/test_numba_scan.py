"""The compiled scan of a sequence against `ssd.scan` in float64: values, states, gradients, and where it is not taken."""

import pytest
import torch
import torch.nn.functional as F
from tiny import prompt, tiny_model

pytest.importorskip("numba")

from nemotron_h_hf.model import numba_scan, ssd  # noqa: E402
from nemotron_h_hf.model.kernels import runs_compiled, scan  # noqa: E402

SIZES = {  # b, l, h, p, g, n
    "one token": (1, 1, 2, 8, 2, 4),
    "odd widths": (1, 33, 4, 20, 1, 24),
    "released widths": (2, 77, 8, 64, 2, 128),
    "several segments": (1, 1100, 2, 8, 1, 16),
}


def inputs(b, l, h, p, g, n):
    torch.manual_seed(0)
    x, B, C = torch.randn(b, l, h * p + 2 * g * n).split([h * p, g * n, g * n], -1)
    dt = F.softplus(torch.randn(b, l, h) - 2) * (torch.rand(b, l, 1) > 0.1)  # a step of 0 is padding
    heads = -torch.rand(h) * 4 - 0.1, torch.randn(h)
    return [x.unflatten(-1, (h, p)), dt, heads[0], B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n)), heads[1]]


def documents(b, l):
    return (torch.rand(b, l) < 0.05).cumsum(1)


def assert_near(got, expected, limit=2e-6):
    for mine, theirs in zip(got, expected, strict=True):
        mine, theirs = mine.detach(), theirs.detach()
        assert float((mine.double() - theirs).norm()) <= limit * float(theirs.norm())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("continued", [False, True])
def test_values_and_gradients(sizes, packed, continued):
    b, l, h, p, g, n = sizes
    tensors = inputs(*sizes) + ([torch.randn(b, h, p, n)] if continued else [])
    seq_idx = documents(b, l) if packed else None
    grads, results = (torch.randn(b, l, h, p), torch.randn(b, h, p, n)), []
    for kind in (torch.float32, torch.float64):
        given = [t.detach().to(kind).requires_grad_() for t in tensors]
        state = given[6] if continued else None
        if kind == torch.float32:
            out = numba_scan.scan(*given[:6], state, seq_idx)
        else:
            out = ssd.scan(*given[:6], 16, state, seq_idx)
        results.append([*out, *torch.autograd.grad(out, given, [grad.to(kind) for grad in grads])])
    assert_near(*results)


def test_only_one_of_the_outputs_is_used():
    tensors = [t.requires_grad_() for t in inputs(1, 40, 4, 16, 2, 16)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    for index, used in ((0, slice(0, 6)), (1, slice(0, 4))):  # the last state knows no C and no D
        mine = torch.autograd.grad(numba_scan.scan(*tensors, None, None)[index].square().sum(), tensors[used])
        theirs = torch.autograd.grad(ssd.scan(*wide, 16)[index].square().sum(), wide[used])
        assert_near(mine, theirs)


def test_a_second_derivative():
    tensors, seconds = inputs(1, 40, 2, 8, 1, 8), []
    for kind, run in (
        (torch.float32, lambda t: numba_scan.scan(*t, None, None)),
        (torch.float64, lambda t: ssd.scan(*t, 16)),
    ):
        given = [t.detach().to(kind).requires_grad_() for t in tensors]
        first = torch.autograd.grad(run(given)[0].square().sum(), given, create_graph=True)
        seconds.append(torch.autograd.grad(sum(t.square().sum() for t in first), given))
    assert_near(*seconds, limit=1e-5)


def test_any_number_of_parts_gives_the_same_bits():
    """As threads would compute them."""
    tensors, results = inputs(2, 100, 6, 16, 3, 16), []
    one = numba_scan._run.one
    for parts in (1, 2, 5, 30):

        def in_parts(*args, parts=parts):
            for part in range(parts):
                one(*args[:-2], part, parts)

        numba_scan._run.one = in_parts
        try:
            given = [t.detach().clone().requires_grad_() for t in tensors]
            y, last = numba_scan.scan(*given, None, None)
            results.append([y, last, *torch.autograd.grad((y.sum() + last.sum()), given)])
        finally:
            numba_scan._run.one = one
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bfloat16_is_computed_in_fp32():
    tensors = inputs(1, 50, 4, 16, 2, 16)
    given = [t.bfloat16() if t.dim() == 4 else t for t in tensors]
    y, last = scan(*given, 16, None, None, "auto")
    assert y.dtype == last.dtype == torch.float32
    assert_near((y, last), ssd.scan(*(t.double() for t in given), 16))


def test_where_it_is_taken(monkeypatch):
    x = torch.randn(1, 4, 2, 8)
    assert runs_compiled(x, None) and runs_compiled(x.bfloat16())
    assert not runs_compiled(x.double()) and not runs_compiled(x[:, :0]) and not runs_compiled(x.to("meta"))
    calls, run = [], numba_scan.scan
    monkeypatch.setattr(numba_scan, "scan", lambda *args: calls.append(1) or run(*args))
    model, ids = tiny_model("dense").train(), prompt(2, 37)
    loss = model(ids, labels=ids).loss
    assert calls
    calls.clear()
    model.set_mamba_implementation("torch")
    torch.testing.assert_close(model(ids, labels=ids).loss, loss, rtol=1e-5, atol=0)
    assert not calls
    assert torch.func.grad(lambda x: x.sum() * (not runs_compiled(x)))(x).sum() == x.numel()
