"""The product of a Linear, fast on a CPU.

Without gradients few rows go to numba_run.py if Numba is installed: fp32, bf16 and torchao's int8 weights are read once,
as they are stored. Without Numba the fp32 product becomes a batch of products, one per part of the output, and every
thread reads its own part, where PyTorch uses one thread of MKL for one row (docs/results/few_rows).

Many rows go to oneDNN, which is part of PyTorch, on processors where it is faster than MKL, which PyTorch takes.

    m rows, k input channels, n output channels, t parts
"""

import math
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from .kernels import compiled_loops
from .plain import is_plain
from .ssd import under_func

logger = logging.get_logger(__name__)

MOST_ROWS = 64
BLOCK_WEIGHTS = 2**20  # 4 MiB in fp32
COMPILED_DTYPES = (torch.float32, torch.bfloat16)
FEWEST_BY_ONEDNN = (
    2**20
)  # weights: below this oneDNN is no faster than MKL (256 rows of 192, 640 outputs: 0.65 ms, MKL 0.62)
FEWEST_WEIGHTS = 2**16  # below this a call of torch's own takes less than reading faster saves: 256 KiB, 5 us


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`: a plain nn.Linear is multiplied as above, everything else is called as a module."""
    if is_plain(linear, nn.Linear) and (few_rows(x) or by_onednn(x, linear.weight)):
        return multiply(x, linear.weight, linear.bias)
    if not computes_in_fp32(x):
        return linear(x)
    with ProductsInFp32():
        return linear(x)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; on a CPU faster. x (..., k), weight (n, k) -> (..., n)."""
    if not few_rows(x):
        if by_onednn(x, weight):
            return onednn_product(x, weight, bias)
        in_fp32 = computes_in_fp32(x) and is_plain_bf16(weight)
        return product_in_fp32(x, weight, bias) if in_fp32 else F.linear(x, weight, bias)
    if reads_compiled(x, weight):
        return compiled_loops().product(x, weight, bias)
    parts = num_parts(x, weight)
    return F.linear(x, weight, bias) if parts == 1 else product_in_parts(x, weight, bias, parts)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies x by this weight: many rows in fp32, both plain, nothing traced.

    The weight has to be dense: with a part of a larger one oneDNN took 1,300 times as long as MKL. It also has to be large:
    oneDNN keeps code of its own for each number of rows, up to 1,024 times about 0.3 MB, and gains nothing for small ones.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not onednn_is_faster():
        return False
    if type(x) not in (Tensor, nn.Parameter) or type(weight) not in (Tensor, nn.Parameter) or weight.device != x.device:
        return False
    if not x.dtype == weight.dtype == torch.float32 or weight.numel() < FEWEST_BY_ONEDNN or torch.jit.is_tracing():
        return False
    if not weight.is_contiguous():
        return False
    many = x.numel() > MOST_ROWS * x.shape[-1]
    return many and torch.backends.mkldnn.enabled and not under_func() and not torch.is_autocast_enabled("cpu")


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN, with gradients where they are asked for."""
    tensors = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _OneDnnProduct.apply(x, weight, bias)
    return _onednn(x, weight, bias)


class _OneDnnProduct(torch.autograd.Function):
    """x (..., k) times weight (n, k), plus bias (n) or None. The gradient of the weight is MKL's: oneDNN's is no faster."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        by_rows = F.linear if torch.is_grad_enabled() else _onednn  # torch's where this gradient will be differentiated
        return (
            by_rows(grad, weight.t(), None) if for_x else None,
            rows.t() @ x.flatten(0, -2) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def computes_in_fp32(x: Tensor) -> bool:
    """Whether products of many rows x are computed in fp32: bf16 on a processor without instructions for it, no gradients."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled() or multiplies_bf16():
        return False
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or under_func()
    return type(x) is Tensor and not traced and not torch.is_autocast_enabled("cpu")


class ProductsInFp32(TorchFunctionMode):
    """Inside, `F.linear` of plain bf16 tensors is `product_in_fp32`, also in modules with hooks or adapters."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and is_plain_bf16(args[0]) and is_plain_bf16(args[1]):
            return product_in_fp32(*args)
        return func(*args, **(kwargs or {}))


def is_plain_bf16(t: Tensor) -> bool:
    """Whether t is bf16 on a CPU and of no subclass with its own products."""
    return type(t) in (nn.Parameter, Tensor) and t.dtype == torch.bfloat16 and t.device.type == "cpu"


def product_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of bf16 tensors, each sum rounded once; the weights become fp32 a block at a time."""
    rows = x.reshape(-1, x.shape[-1]).float()
    y = x.new_empty(len(rows), len(weight))
    step = max(1, BLOCK_WEIGHTS // x.shape[-1])
    for start in range(0, len(weight), step):
        block = slice(start, start + step)
        y[:, block] = multiply(rows, weight[block].float(), None if bias is None else bias[block].float())
    return y.view(*x.shape[:-1], len(weight))


def few_rows(x: Tensor) -> bool:
    """Whether x (..., k) are at most `MOST_ROWS` rows on a CPU, and nothing records the operations on them."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False  # asked before the sizes, which an exported program is to leave open
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1] and not torch.is_autocast_enabled("cpu")


def num_parts(x: Tensor, weight: Tensor) -> int:
    """Into how many parts the product is divided: a divisor of n, 1 where torch's own is taken."""
    plain = type(weight) in (nn.Parameter, Tensor) and x.dtype == weight.dtype == torch.float32
    return math.gcd(weight.shape[0], torch.get_num_threads()) if plain and weight.numel() >= FEWEST_WEIGHTS else 1


def product_in_parts(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    """x (..., k), weight (n, k) -> (..., n)."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.bmm(rows.expand(parts, -1, -1), weight.unflatten(0, (parts, -1)).transpose(1, 2))  # (t, m, n / t)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def reads_compiled(x: Tensor, weight: Tensor) -> bool:
    """Whether numba_run.py multiplies x by this weight. It reads memory, which tracing and torch.func do not see."""
    if type(x) is not Tensor or torch.jit.is_tracing() or under_func():
        return False
    if type(weight) not in (nn.Parameter, Tensor):
        return reads_int8(weight)
    if x.dtype != weight.dtype or x.dtype not in COMPILED_DTYPES or weight.numel() < FEWEST_WEIGHTS:
        return False
    if x.dtype == torch.bfloat16 and x.numel() > most_bf16_rows() * x.shape[-1]:
        return False
    return weight.stride(-1) == 1 and weight.device.type == "cpu" and compiled_loops() is not None


def reads_int8(weight: Tensor) -> bool:
    """Whether numba_run.py multiplies by this weight of torchao."""
    if type(weight).__name__ != "Int8Tensor":
        return False
    if compiled_loops() is None:
        logger.warning_once("int8 weights: without Numba torchao makes them fp32 for every token; pip install numba")
        return False
    return compiled_loops().can_read_int8(weight)


def most_bf16_rows() -> int:
    """Rows of bf16 that numba_run.py multiplies faster than torch, which has the processor's own products."""
    if not multiplies_bf16():
        return MOST_ROWS
    return 1 if compiled_loops() is None else compiled_loops().MOST_BF16_ROWS


@cache
def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bf16: on others torch's are several times slower than fp32's."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor of AMD, where PyTorch's fp32 products are MKL's: on an EPYC with AVX-512, for 65 to 2,048 rows
    and Linear layers of 0.4 to 33 million weights, oneDNN makes 88 to 107 GFLOP/s, MKL 64 to 95; backward 84 to 106, 71 to 93."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    told = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (told.read_text() if told.exists() else platform.processor())
