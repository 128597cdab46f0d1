"""The product of a Linear, fast for few rows on a CPU.

PyTorch multiplies one row by a matrix on one thread of MKL, and a few rows by even slower code: both read the weights
at half the memory's speed or less. Here the product becomes a batch of products, one per part of the output, and every
thread reads its own part: 1.1 to 1.7 times as fast for 1 to 64 rows on two cores (docs/results/few_rows). torchao's int8
weights go to `int8.py` if Numba is installed.

    m rows, k input channels, n output channels, t parts
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from .forks import is_forked
from .plain import is_plain

logger = logging.get_logger(__name__)

MOST_ROWS = 64
FEWEST_WEIGHTS = 2**18  # below this, synchronising threads takes longer than it saves


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`: of a plain nn.Linear few rows are multiplied by all threads, everything else is called as a module."""
    return multiply(x, linear.weight, linear.bias) if few_rows(x) and is_plain(linear, nn.Linear) else linear(x)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; without gradients, on a CPU, few rows are multiplied by all threads. x (..., k), weight (n, k) -> (..., n)."""
    if not few_rows(x):
        return F.linear(x, weight, bias)
    if reads_int8(weight):
        _, product = int8()
        return product(x, weight, bias)
    parts = num_parts(x, weight)
    return F.linear(x, weight, bias) if parts == 1 else product_in_parts(x, weight, bias, parts)


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


def reads_int8(weight: Tensor) -> bool:
    """Whether `int8.py` multiplies by this weight."""
    if type(weight).__name__ != "Int8Tensor" or torch.jit.is_tracing() or is_forked() or int8() is None:
        return False
    can_read, _ = int8()
    return can_read(weight)


@cache
def int8() -> tuple[Callable, Callable] | None:
    """`can_read` and `product` of `int8.py`, compiled; None without Numba."""
    try:
        from .int8 import can_read, product
    except ImportError:
        logger.warning("int8 weights: without Numba torchao makes them fp32 for every token; pip install numba")
        return None
    return can_read, product
