"""`ssd.gated_norm` in Triton: RMSNorm over groups of channels of v = x * silu(gate), times a weight, in fp32.

With r = 1 / sqrt(mean(v^2) + eps) of a group, out = v r w and q = dout * w:

    dv = r (q - v r^2 mean(q v))      dx = dv silu(gate)      dgate = dv x silu'(gate)      dw = sum of dout v r

r is computed again in the backward pass: the group is in registers by then. For dw a program walks down some of the rows
and leaves one sum of them, so nothing is added in an order that changes from run to run.

    rows of d channels, d = groups * group_size
"""

import torch
from torch import Tensor

from .triton_launch import last_contiguous, on, tl, triton

MAX_GROUP = 65536  # channels in the registers of one program
ROWS_PER_PROGRAM = 16  # of the backward pass


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """`ssd.gated_norm`: x, gate (..., d), weight (d) -> (..., d) in gate's dtype.

    Raises:
        ValueError: for a group of more than 65,536 channels.
    """
    if group_size > MAX_GROUP:
        raise ValueError(f"group_size={group_size}: the Triton kernels take groups up to {MAX_GROUP}")
    x, gate, shape = x.reshape(-1, x.shape[-1]), gate.reshape(-1, gate.shape[-1]), gate.shape
    rows = last_contiguous(x), last_contiguous(gate)
    return GatedNorm.apply(*rows, weight.contiguous(), group_size, eps).view(shape)


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, group_size, eps):
        number, d = x.shape
        out = gate.new_empty(number, d)
        with on(x):
            forward_kernel[(number, d // group_size)](
                x, gate, weight, out, x.stride(0), gate.stride(0), eps, **_sizes(d, group_size)
            )
        ctx.save_for_backward(x, gate, weight)
        ctx.group_size, ctx.eps = group_size, eps
        return out

    @staticmethod
    def backward(ctx, dout):
        x, gate, weight = ctx.saved_tensors
        number, d = x.shape
        programs = triton.cdiv(number, ROWS_PER_PROGRAM)
        dx, dgate = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gate))
        shares = x.new_empty(programs, d, dtype=torch.float32)
        with on(x):
            backward_kernel[(programs, d // ctx.group_size)](
                x, gate, weight, dout.contiguous(), dx, dgate, shares, number, x.stride(0), gate.stride(0), ctx.eps,
                **_sizes(d, ctx.group_size), ROWS=ROWS_PER_PROGRAM,
            )  # fmt: skip
        return dx, dgate, shares.sum(0).to(weight.dtype), None, None


def _sizes(d: int, group_size: int) -> dict[str, int]:
    block = triton.next_power_of_2(group_size)
    return {"D": d, "SIZE": group_size, "BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


@triton.jit
def forward_kernel(
    x, gate, weight, out, xr, gr, eps, D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (rows, groups); rows are d apart in `out`, xr and gr apart in x and gate."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, d = column < SIZE, tl.program_id(1) * SIZE + column
    z = tl.load(gate + row * gr + d, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + row * xr + d, mask=mask, other=0.0).to(tl.float32) * z * tl.sigmoid(z)
    r = tl.rsqrt(tl.sum(v * v, 0) / SIZE + eps)
    normed = v * r * tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["number"])
def backward_kernel(
    x, gate, weight, dout, dx, dgate, shares, number, xr, gr, eps,
    D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS rows, groups); shares (blocks, d)."""
    column = tl.arange(0, BLOCK)
    inside, d = column < SIZE, tl.program_id(1) * SIZE + column
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for offset in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + offset
        mask = inside & (row + tl.zeros_like(column) < number)
        z = tl.load(gate + row * gr + d, mask=mask, other=0.0).to(tl.float32)
        inputs = tl.load(x + row * xr + d, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dout + row * D + d, mask=mask, other=0.0).to(tl.float32)
        opened = tl.sigmoid(z)
        v = inputs * z * opened
        r = tl.rsqrt(tl.sum(v * v, 0) / SIZE + eps)
        share += grad * v * r
        q = grad * w
        dv = r * (q - v * (r * r * tl.sum(q * v, 0) / SIZE))
        tl.store(dx + row * D + d, (dv * z * opened).to(dx.dtype.element_ty), mask=mask)
        dz = dv * inputs * opened * (1 + z * (1 - opened))
        tl.store(dgate + row * D + d, dz.to(dgate.dtype.element_ty), mask=mask)
    tl.store(shares + tl.program_id(0).to(tl.int64) * D + d, share, mask=inside)
