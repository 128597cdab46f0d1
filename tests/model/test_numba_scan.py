"""The compiled scan of a sequence against `ssd.scan` in float64: values, states, and where it is not taken."""

import pytest
import torch
import torch.nn.functional as F
from tiny import prompt, tiny_model
from torch.utils.flop_counter import FlopCounterMode

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
def test_values_and_last_states(sizes, packed, continued):
    b, l, h, p, g, n = sizes
    tensors, state = inputs(*sizes), torch.randn(b, h, p, n) if continued else None
    seq_idx = documents(b, l) if packed else None
    expected = ssd.scan(*(t.double() for t in tensors), 16, state if state is None else state.double(), seq_idx)
    assert_near(numba_scan.scan(*tensors, state, seq_idx), expected)


def test_shapes_that_do_not_fit():
    x, dt, A, B, C, D = inputs(1, 5, 4, 8, 2, 4)
    for given in (
        (x, dt[:, :3], A, B, C, D),
        (x, dt, A[:1], B, C, D),
        (x, dt, A, B, C[:, :4], D),
        (x, dt, A, B, C, D[1:]),
    ):
        with pytest.raises(ValueError, match="a scan of x"):
            numba_scan.scan(*given, None, None)
    with pytest.raises(ValueError, match="a scan of x"):
        numba_scan.scan(x, dt, A, B, C, D, torch.zeros(1, 4, 8, 5), None)


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
            results.append(numba_scan.scan(*tensors, None, None))
        finally:
            numba_scan._run.one = one
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bfloat16_is_computed_in_fp32():
    tensors = inputs(1, 50, 4, 16, 2, 16)
    given = [t.bfloat16() if t.dim() == 4 else t for t in tensors]
    with torch.no_grad():
        y, last = scan(*given, 16, None, None, "auto")
    assert y.dtype == last.dtype == torch.float32
    assert_near((y, last), ssd.scan(*(t.double() for t in given), 16))


def test_where_it_is_taken(monkeypatch):
    x = torch.randn(1, 4, 2, 8)
    with torch.no_grad():
        check_tensors(x)
    assert not runs_compiled(x)
    calls, run = [], numba_scan.scan
    monkeypatch.setattr(numba_scan, "scan", lambda *args: calls.append(1) or run(*args))
    model, ids = tiny_model("dense"), prompt(2, 37)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert calls
    calls.clear()
    torch.testing.assert_close(model(ids, labels=ids).loss, loss, rtol=1e-5, atol=0)
    assert not calls


def check_tensors(x):
    assert runs_compiled(x, None) and runs_compiled(x.bfloat16())
    assert not runs_compiled(x.double()) and not runs_compiled(x[:, :0]) and not runs_compiled(x.to("meta"))
    assert torch.func.grad(lambda x: x.sum() * (not runs_compiled(x)))(x).sum() == x.numel()
    with FlopCounterMode(display=False):
        assert not runs_compiled(x)
