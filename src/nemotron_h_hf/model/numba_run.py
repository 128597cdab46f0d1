"""Runs compiled operations one after the other, on one thread or on several (numba_compile.py). Needs Numba.

An operation is (which, bytes that it reads, integers, floats), as `product_of`, `step_of` and `attention_of` make them.
Tensors are addresses in it: they must live until it has run, and nothing of it is seen by autograd or a tracer.

For one row torch reads fp32 weights at two thirds of the memory's speed, bf16 ones at a third; by torchao's int8 weights
it multiplies by making them fp32 first, every time (docs/results/few_rows, docs/results/int8).

    m rows, k input channels, n output channels; b batch, h heads, p head_dim, g groups, n state, d channels, v key heads
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .numba_compile import Kernel
from .numba_loops import ATTENTION, MOST_INTS, MOST_REALS, PRODUCT, STEP, on_one_thread, on_threads, part_at

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_run = Kernel(on_one_thread, on_threads)


def run(operations: Sequence[tuple]) -> None:
    """Run them in this order."""
    which, sizes, ints, reals = zip(*operations)
    ints = np.array([row + (0,) * (MOST_INTS - len(row)) for row in ints], np.int64)
    reals = np.array([row + (0,) * (MOST_REALS - len(row)) for row in reals], np.float64)
    _run(sum(sizes), part_at.address, np.array(which), ints.ctypes.data, reals.ctypes.data)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x (..., k) in any floating dtype and a weight as in `product_of` -> (..., n) in x's dtype; no gradients."""
    rows, held = x.detach().reshape(-1, x.shape[-1]).float().contiguous(), []
    values = weight.qdata if type(weight).__name__ == "Int8Tensor" else weight
    y = rows.new_empty(len(rows), values.shape[0])
    run([product_of(rows, weight, y, held)])
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
    run([step_of(rows, conv_state, ssm_state, weights, groups, (norm[1], *limit), out)])
    return out.to(projected.dtype)


def product_of(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    held: list[Tensor],
    norm: tuple[Tensor, float] | None = None,
    is_squared: bool = False,
    residual: Tensor | None = None,
    orders: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple:
    """The operation y (m, n) = x (m, k) times a weight (n, k) of fp32, bf16 or an Int8Tensor that `can_read_int8`.

    Args:
        x, y, residual: fp32 and contiguous.
        held: gets what has to live until the operation runs.
        norm: weight (k), fp32 or bf16, and epsilon of an RMSNorm of x before the product.
        is_squared: relu(y)^2 after it.
        residual: (m, n), added after that.
        orders: the row of the weight for each output (n), the input of each column (k), int64, None for as they are; with
            the first the weight may have more rows.
    """
    scale_at = residual_at = norm_at = norm_is_bf16 = 0
    eps = 0.0
    if type(weight) not in (Tensor, nn.Parameter):
        scale = weight.scale.detach().float().contiguous()
        held.append(scale)
        weight, scale_at = weight.qdata, scale.data_ptr()
    if norm is not None:
        norm_weight, eps = norm
        norm_at, norm_is_bf16 = norm_weight.data_ptr(), norm_weight.dtype == torch.bfloat16
    if residual is not None:
        residual_at = residual.data_ptr()
    m, n, k = y.size(0), y.size(1), x.size(1)
    order_at = [0 if order is None else order.data_ptr() for order in orders]
    rows_fit = weight.size(0) == n if orders[0] is None else len(orders[0]) == n <= weight.size(0)
    if not rows_fit or weight.size(1) != k or len(x) != m:
        raise ValueError(f"a weight {tuple(weight.shape)} does not multiply {tuple(x.shape)} to {tuple(y.shape)}")
    ints = (
        KINDS[weight.dtype], x.data_ptr(), norm_at, norm_is_bf16, weight.data_ptr(), weight.stride(0), scale_at, is_squared,
        residual_at, y.data_ptr(), m, n, k, *order_at,
    )  # fmt: skip
    return PRODUCT, n * k * weight.element_size(), ints, (eps,)


def step_of(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: tuple[Tensor | None, ...],
    groups: int,
    limits: tuple[float, float, float],
    out: Tensor,
) -> tuple:
    """The operation in_proj's output (b, gate + d + h) -> out_proj's input (b, h * p); updates the states.

    Args:
        projected, out: fp32 and contiguous.
        conv_state: (b, d, k), fp32 or bf16, in any order.
        ssm_state: (b, h, p, n), fp32 and contiguous.
        weights: taps (d, k), bias (d) or None, A_log (h), D (h), dt_bias (h), norm (h * p), each fp32 or bf16.
        limits: epsilon of the norm, least and largest step size.
    """
    addresses = [0 if weight is None else weight.data_ptr() for weight in weights]
    bf16 = sum((weight is not None and weight.dtype == torch.bfloat16) << i for i, weight in enumerate(weights))
    (b, h, p, n), k = ssm_state.shape, conv_state.size(2)
    ints = (
        projected.data_ptr(), conv_state.data_ptr(), *conv_state.stride(), conv_state.dtype == torch.bfloat16,
        ssm_state.data_ptr(), *addresses, bf16, out.data_ptr(), b, h, p, n, groups, k,
    )  # fmt: skip
    return STEP, 4 * b * h * p * n, ints, limits


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
