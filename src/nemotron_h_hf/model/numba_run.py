"""Runs compiled operations one after the other, on one thread or on several (numba_compile.py). Needs Numba.

An operation is (which, bytes that it reads, integers, floats), as `product_of`, `step_of`, `attention_of` and `norm_of` make them.
Tensors are addresses in it: they must live until it has run, and nothing of it is seen by autograd or a tracer. What stays the
same from token to token is made once (`factor_of`, `recurrence_of`).

For one row torch reads fp32 weights at two thirds of the memory's speed, bf16 ones at a third; by torchao's int8 weights
it multiplies by making them fp32 first, every time (docs/results/few_rows, docs/results/int8).

    m rows, k input channels, n output channels; b batch, h heads, p head_dim, g groups, n state, d channels, v key heads
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .numba_compile import Kernel
from .numba_dot import HAS_DOT
from .numba_loops import ATTENTION, MOST_INTS, MOST_REALS, NORM, PRODUCT, STEP, on_one_thread, on_threads, part_at

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

# Rows of bf16 that are faster here than by torch where the processor multiplies bf16. 4096 x 1024 weights: 1 row 0.32 ms (torch 0.81),
# 4 rows 0.58 (0.89), 8 rows 0.98 (1.03), 16 rows 1.99 (1.34)
MOST_BF16_ROWS = 8 if HAS_DOT else 1

_run = Kernel(on_one_thread, on_threads)


def run(operations: Sequence[tuple]) -> None:
    """Run them in this order."""
    which, sizes, ints, reals = zip(*operations)
    ints = np.array([row + (0,) * (MOST_INTS - len(row)) for row in ints], np.int64)
    reals = np.array([row + (0,) * (MOST_REALS - len(row)) for row in reals], np.float64)
    _run(sum(sizes), part_at.address, np.array(which), ints.ctypes.data, reals.ctypes.data)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x (..., k) in any floating dtype and a weight as in `factor_of` -> (..., n) in x's dtype; no gradients."""
    rows, factor = x.detach().reshape(-1, x.shape[-1]).float().contiguous(), factor_of(weight)
    y = rows.new_empty(rows.size(0), factor.n)
    run([product_of(rows, factor, y)])
    y = y if bias is None else y.add_(bias)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def step(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv: tuple[Tensor, Tensor | None],
    heads: tuple[Tensor, Tensor, Tensor],
    norm: tuple[Tensor, float],
    groups: int,
    limit: tuple[float, float],
) -> Tensor:
    """`triton_decode.step` on a CPU; ssm_state has to be fp32 and contiguous."""
    rows = projected.detach().float().contiguous()
    weights = [None if weight is None else weight.contiguous() for weight in (*conv, *heads, norm[0])]
    out = rows.new_empty(len(rows), len(norm[0]))
    run([step_of(rows, conv_state, ssm_state, recurrence_of(weights, groups, (norm[1], *limit)), out)])
    return out.to(projected.dtype)


class Factor(NamedTuple):
    """A weight (n, k) and what is done with it, as numbers: true for as long as all that it was made of lives and stays in its
    memory."""

    n: int
    k: int
    num_bytes: int
    ints: tuple[int, ...]
    reals: tuple[float, ...]
    scale: Tensor | None  # may be a copy, which has to live


def factor_of(
    weight: Tensor,
    norm: tuple[Tensor, float] | None = None,
    is_squared: bool = False,
    orders: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Factor:
    """What `product_of` multiplies by.

    Args:
        weight: (n, k) of fp32, bf16 or an Int8Tensor that `can_read_int8`.
        norm: weight (k), fp32 or bf16, and epsilon of an RMSNorm of the inputs before the product.
        is_squared: relu(y)^2 after it.
        orders: the row of the weight for each output (n), the input of each column (k), int64, None for as they are; with
            the first the weight may have more rows.
    """
    scale, norm_weight, eps = None, *(norm or (None, 0.0))
    if type(weight) not in (Tensor, nn.Parameter):
        weight, scale = weight.qdata, weight.scale.detach().float().contiguous()
    n, k = weight.shape[0] if orders[0] is None else len(orders[0]), weight.shape[1]
    if n > weight.shape[0] or (orders[1] is not None and len(orders[1]) != k):
        raise ValueError(
            f"a weight {tuple(weight.shape)} is not ordered by {[order is not None and len(order) for order in orders]}"
        )
    norm_at, scale_at, rows_at, columns_at = map(_address, (norm_weight, scale, *orders))
    ints = (KINDS[weight.dtype], norm_at, _is_bf16(norm_weight), weight.data_ptr(), weight.stride(0), scale_at, is_squared,
            rows_at, columns_at)  # fmt: skip
    return Factor(n, k, n * k * weight.element_size(), ints, (eps,), scale)


def product_of(x: Tensor, factor: Factor, y: Tensor, residual: Tensor | None = None) -> tuple:
    """The operation y (m, n) = x (m, k) times a weight (n, k), plus `residual` (m, n); all fp32 and contiguous."""
    m, n, k = x.size(0), factor.n, factor.k
    if x.size(1) != k or y.size(0) != m or y.size(1) != n:
        raise ValueError(f"a weight ({n}, {k}) does not multiply {tuple(x.shape)} to {tuple(y.shape)}")
    return (
        PRODUCT,
        factor.num_bytes,
        (x.data_ptr(), _address(residual), y.data_ptr(), m, n, k, *factor.ints),
        factor.reals,
    )


def norm_of(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> tuple:
    """The operation y (m, k) = RMSNorm of x (m, k), both fp32 and contiguous; weight (k), fp32 or bf16."""
    m, k = x.shape
    return NORM, 4 * m * k, (x.data_ptr(), y.data_ptr(), m, k, weight.data_ptr(), _is_bf16(weight)), (eps,)


class Recurrence(NamedTuple):
    """A Mamba layer's weights between its projections, as numbers, like `Factor`."""

    ints: tuple[int, ...]
    limits: tuple[float, float, float]


def recurrence_of(weights: Sequence[Tensor | None], groups: int, limits: tuple[float, float, float]) -> Recurrence:
    """What `step_of` computes with.

    Args:
        weights: taps (d, k), bias (d) or None, A_log (h), D (h), dt_bias (h), norm (h * p), each fp32 or bf16, contiguous.
        limits: epsilon of the norm, least and largest step size.
    """
    bf16 = sum(_is_bf16(weight) << i for i, weight in enumerate(weights))
    return Recurrence((*map(_address, weights), bf16, groups), limits)


def step_of(projected: Tensor, conv_state: Tensor, ssm_state: Tensor, recurrence: Recurrence, out: Tensor) -> tuple:
    """The operation in_proj's output (b, gate + d + h) -> out_proj's input (b, h * p); updates the states.

    Args:
        projected, out: fp32 and contiguous.
        conv_state: (b, d, k), fp32 or bf16, in any order.
        ssm_state: (b, h, p, n), fp32 and contiguous.
    """
    (b, h, p, n), k = ssm_state.shape, conv_state.size(2)
    ints = (
        projected.data_ptr(), conv_state.data_ptr(), *conv_state.stride(), conv_state.dtype == torch.bfloat16,
        ssm_state.data_ptr(), out.data_ptr(), b, h, p, n, k, *recurrence.ints,
    )  # fmt: skip
    return STEP, 4 * b * h * p * n, ints, recurrence.limits


def attention_of(
    query: Tensor, new: tuple[Tensor, Tensor], key: Tensor, value: Tensor, scaling: float, out: Tensor
) -> tuple:
    """The operation query (b, h * d) -> out (b, h * d).

    Args:
        query, out: fp32 and contiguous.
        new: the token's own key and value (b, v * d), fp32 and contiguous: written to the last place of the next two.
        key, value: (b, v, l, d) of fp32 or bf16, whose last stride is 1.
    """
    b, v, length, d = key.shape
    ints = (
        query.data_ptr(), new[0].data_ptr(), new[1].data_ptr(), key.data_ptr(), value.data_ptr(),
        key.dtype == torch.bfloat16, *key.stride()[:3], *value.stride()[:3], out.data_ptr(), b, out.size(1) // d, v, length, d,
    )  # fmt: skip
    return ATTENTION, 2 * b * v * length * d * key.element_size(), ints, (scaling,)


def can_read_int8(weight: Tensor) -> bool:
    """Whether an Int8Tensor is of the kind that `Int8WeightOnlyConfig()` makes: one scale for a row, no zero points, no
    scale or quantisation of the inputs."""
    values = weight.qdata  # asking `weight` itself for its shape takes microseconds
    return (
        list(weight.block_size) == [1, values.shape[-1]]
        and values.is_contiguous()
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
        and (weight.zero_point is None or not weight.zero_point.numpy().any())
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_bf16(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16
