"""relu(x)^2 in Triton: read once and written once; backward dx = 2 relu(x) dout, in one kernel too.

The square is rounded once, as PyTorch's product of two rectified values is. NaN stays NaN.
"""

import torch
from torch import Tensor

from .triton_launch import on, tl, triton

BLOCK, WARPS = 2048, 4  # values of one program


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 in x's shape and dtype: bfloat16, float16 or fp32."""
    return SquaredRelu.apply(x)


class SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        with on(x):
            forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return out

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph: PyTorch can derive this again
            return 2 * torch.relu(x) * dout
        x, dout = x.contiguous(), dout.contiguous()
        dx = torch.empty_like(x)
        with on(x):
            backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, dout, dx, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return dx


@triton.jit
def forward_kernel(x, out, number, BLOCK: tl.constexpr):
    """Grid (blocks). Whether 16 divides the number of values decides how many one load takes, and is specialised."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < number, other=0.0).to(tl.float32)
    tl.store(out + i, tl.where(value <= 0, 0.0, value * value).to(out.dtype.element_ty), mask=i < number)


@triton.jit
def backward_kernel(x, dout, dx, number, BLOCK: tl.constexpr):
    """Grid (blocks)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < number, other=0.0).to(tl.float32)
    grad = tl.load(dout + i, mask=i < number, other=0.0).to(tl.float32)
    tl.store(dx + i, tl.where(value <= 0, 0.0, 2 * value * grad).to(dx.dtype.element_ty), mask=i < number)
