"""What every Triton kernel of this folder needs at its launch: Triton itself, the device, the dtype of its products.

Triton comes with PyTorch's CUDA builds. Files with kernels take `triton` and `tl` from here, and one message says
what is missing. Kernels never specialise on a length, and offsets that grow with one are 64-bit.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("mamba_implementation='triton' needs triton, which comes with PyTorch for CUDA") from missing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself reads it, once, where a kernel is defined
PRODUCTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def on(x: Tensor) -> AbstractContextManager:
    """Kernels start on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def products(dtype: torch.dtype) -> dict[str, object]:
    """DOT, the dtype of a product's operands (results are always fp32), and PRECISION, how fp32 operands are multiplied.

    Tensor cores take fp32 as TF32. Three such products make up one of nearly fp32's precision; one alone does where the user
    allows it to matrix products (`torch.backends.cuda.matmul`).
    """
    dot = PRODUCTS[dtype]
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter holds bfloat16 as integers and would multiply those
        dot = tl.float32
    return {"DOT": dot, "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"}


def padded(size: int) -> int:
    """The block that holds `size` columns: a power of two, 16 at least, the smallest side of a product."""
    return max(16, triton.next_power_of_2(size))


def choices(*settings: tuple[int, int]) -> list["triton.Config"]:
    """Pairs of (warps, stages) among which a GPU's clock decides; the interpreter has no clock and takes the first."""
    configurations = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in settings]
    return configurations[:1] if INTERPRETED else configurations


def last_contiguous(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, as the kernels read it, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
