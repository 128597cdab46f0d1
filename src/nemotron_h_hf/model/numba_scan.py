"""`ssd.scan` on a CPU by compiled loops (numba_scan_loops.py), forward and backward. Needs Numba.

b batch, l length, h heads, p head_dim, g groups, n state
"""

import numpy as np
import torch
from torch import Tensor

from .numba_compile import Kernel
from .numba_loops import on_one_thread, on_threads
from .numba_scan_loops import BACKWARD, CHUNK, FORWARD, KEPT_CHUNKS, LANES, NUM_INTS, part_at
from .ssd import scan as scan_by_torch

_run = Kernel(on_one_thread, on_threads)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ssd.scan` of fp32 or bf16 tensors, computed in fp32, with gradients where they are asked for."""
    tensors = [_in_rows(x), dt.float().contiguous(), A.float().contiguous()]
    tensors += [*_alike(_in_rows(B), _in_rows(C)), D.float().contiguous()]
    state = None if initial_state is None else initial_state.float().contiguous()
    documents = None if seq_idx is None else seq_idx.long().contiguous()
    return _Scan.apply(*tensors, state, documents, torch.is_grad_enabled())


def _in_rows(t: Tensor) -> Tensor:
    """fp32, all values of a token next to each other."""
    t = t.float()
    return t if t.stride(3) == 1 and t.stride(2) == t.shape[3] else t.contiguous()


def _alike(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the same strides."""
    return (B, C) if B.stride() == C.stride() else (B.contiguous(), C.contiguous())


class _Scan(torch.autograd.Function):
    """x (b, l, h, p), dt (b, l, h), A (h), B, C (b, l, g, n), D (h), state (b, h, p, n) or None, documents (b, l) or None."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, documents, keeps):
        (b, l, h, p), n = x.shape, B.shape[3]
        kept, size = None, 0
        if keeps and any(ctx.needs_input_grad):
            changes = 0 if documents is None or l == 1 else int((documents[:, 1:] != documents[:, :-1]).sum(1).max())
            size = (-(-l // CHUNK) + changes) // KEPT_CHUNKS + 1
            kept = x.new_empty(b, size, h, _up(n), _up(p))
        y, last = x.new_empty(b, l, h, p), x.new_empty(b, h, p, n)
        _call(FORWARD, x, dt, A, B, C, D, documents, state, y, last, kept, size)
        ctx.save_for_backward(x, dt, A, B, C, D, state, documents, kept)
        ctx.size = size
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx, grad, grad_last):
        *inputs, documents, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated
            return *_differentiable(inputs, documents, grad, grad_last, ctx.needs_input_grad), None, None
        x, dt, A, B, C, D, state = inputs
        (b, l, h, p), (g, n) = x.shape, B.shape[2:]
        grad = x.new_zeros(x.shape) if grad is None else grad.contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        of_x, of_dt, of_A, of_D = x.new_empty(b, l, h, p), dt.new_empty(b, l, h), A.new_empty(b, h), D.new_empty(b, h)
        of_B, of_C = B.new_empty(b, l, g, n), B.new_empty(b, l, g, n)
        of_state = None if state is None else torch.empty_like(state)
        outputs = (of_x, of_dt, of_A, of_D, of_B, of_C, of_state)
        _call(BACKWARD, x, dt, A, B, C, D, documents, state, grad, grad_last, kept, ctx.size, outputs)
        return of_x, of_dt, of_A.sum(0), of_B, of_C, of_D.sum(0), of_state, None, None


def _differentiable(inputs, documents, grad, grad_last, needed):
    """The gradients of `ssd.scan`, in operations that autograd knows."""
    out = scan_by_torch(*inputs[:6], CHUNK, inputs[6], documents)
    asked = [(o, g) for o, g in zip(out, (grad, grad_last)) if g is not None]
    wanted = [tensor for tensor, is_needed in zip(inputs, needed) if is_needed]
    found = torch.autograd.grad(
        [o for o, _ in asked], wanted, [g for _, g in asked], create_graph=True, allow_unused=True
    )
    found = iter(found)
    return [next(found) if is_needed else None for is_needed in needed[:7]]


def _call(which, x, dt, A, B, C, D, documents, state, y, last, kept, size, outputs=()):
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    at = [0 if t is None else t.data_ptr() for t in (documents, state, y, last, kept, *outputs)]
    numbers = (
        x.data_ptr(), x.stride(0), x.stride(1), dt.data_ptr(), A.data_ptr(), D.data_ptr(), B.data_ptr(), C.data_ptr(),
        B.stride(0), B.stride(1), *at[:5], size, b, l, h, p, g, n, *at[5:],
    )  # fmt: skip
    ints = np.array(numbers + (0,) * (NUM_INTS - len(numbers)), np.int64)
    _run(4 * x.numel(), part_at.address, np.array([which]), ints.ctypes.data, 0)


def _up(size: int) -> int:
    return -(-size // LANES) * LANES
