"""The product of a few rows and a matrix of fp32, bf16 or int8 weights on a CPU, at the speed of its memory. Needs Numba.

For one row torch reads fp32 weights at two thirds of the memory's speed, bf16 ones at a third; by torchao's int8 weights
it multiplies by making them fp32 first, every time. Here each weight is read once, as it is stored, and becomes fp32 in a
register; sums are fp32 (docs/results/few_rows, docs/results/int8). An RMSNorm before the product, and relu(y)^2 and an
addition after it, can be part of it.

    m rows, k input channels, n output channels
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from .numba_compile import carray, compiled, floats, pointer, widened

PRODUCT = 0  # in numba_run.py
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def product_of(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    held: list[Tensor],
    norm: tuple[Tensor, float] | None = None,
    is_squared: bool = False,
    residual: Tensor | None = None,
) -> tuple:
    """The operation (numba_run.py) y (m, n) = x (m, k) times a weight (n, k) of fp32, bf16 or an Int8Tensor that `can_read_int8`.

    Args:
        x, y, residual: fp32 and contiguous.
        held: gets what has to live until the operation runs.
        norm: weight (k), fp32 or bf16, and epsilon of an RMSNorm of x before the product.
        is_squared: relu(y)^2 after it.
        residual: (m, n), added after that.
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
    ints = (
        KINDS[weight.dtype], x.data_ptr(), norm_at, norm_is_bf16, weight.data_ptr(), weight.stride(0), scale_at, is_squared,
        residual_at, y.data_ptr(), m, n, k,
    )  # fmt: skip
    return PRODUCT, n * k * weight.element_size(), ints, (eps,)


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


@compiled
def product_part(ints, reals, part, parts):  # pragma: no cover, machine code
    """One part of the columns of `product_of`; tensors are addresses, 0 for none."""
    kind, x, norm, norm_is_bf16, w, stride, scale = ints[0], ints[1], ints[2], ints[3], ints[4], ints[5], ints[6]
    is_squared, residual, y, m, n, k = ints[7], ints[8], ints[9], ints[10], ints[11], ints[12]
    first, last = n * part // parts, n * (part + 1) // parts
    inputs, outputs = carray(pointer(x), m * k, np.float32), carray(pointer(y), m * n, np.float32)
    by, size = np.ones(1, np.float32), (n - 1) * stride + k
    if scale != 0:
        by = carray(pointer(scale), n, np.float32)
    if norm != 0:
        inputs = _normed(inputs, floats(norm, norm_is_bf16, k), np.float32(reals[0]), m, k)
    if kind == 0:
        _multiply(inputs, carray(pointer(w), size, np.float32), stride, by, outputs, m, n, k, first, last)
    elif kind == 1:
        _multiply(inputs, carray(pointer(w), size, np.uint16), stride, by, outputs, m, n, k, first, last)
    else:
        _multiply(inputs, carray(pointer(w), size, np.int8), stride, by, outputs, m, n, k, first, last)
    if is_squared or residual != 0:
        added = outputs
        if residual != 0:
            added = carray(pointer(residual), m * n, np.float32)
        _finish(outputs, added, is_squared, residual != 0, m, n, first, last)


@compiled
def _multiply(x, w, stride, scale, y, m, n, k, first, last):  # pragma: no cover, machine code
    """Columns first..last of y (m, n) = x (m, k) times rows of w, `stride` apart, times scale (n)."""
    if m == 1:
        for j in range(first, last):
            row, total = w[j * stride : j * stride + k], np.float32(0)
            for c in range(k):
                total += x[c] * widened(row[c])
            y[j] = total * scale[j * (len(scale) > 1)]
        return
    for j in range(first, last, 4):  # 4 x 4 sums fill the registers; at an edge some are computed twice
        j1, j2, j3 = min(j + 1, last - 1), min(j + 2, last - 1), min(j + 3, last - 1)
        row0, row1 = w[j * stride : j * stride + k], w[j1 * stride : j1 * stride + k]
        row2, row3 = w[j2 * stride : j2 * stride + k], w[j3 * stride : j3 * stride + k]
        for i in range(0, m, 4):
            i1, i2, i3 = min(i + 1, m - 1), min(i + 2, m - 1), min(i + 3, m - 1)
            input0, input1 = x[i * k : i * k + k], x[i1 * k : i1 * k + k]
            input2, input3 = x[i2 * k : i2 * k + k], x[i3 * k : i3 * k + k]
            a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = np.float32(0)
            a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = np.float32(0)
            for c in range(k):
                w0, w1, w2, w3 = widened(row0[c]), widened(row1[c]), widened(row2[c]), widened(row3[c])
                x0, x1, x2, x3 = input0[c], input1[c], input2[c], input3[c]
                a00, a01, a02, a03 = a00 + w0 * x0, a01 + w0 * x1, a02 + w0 * x2, a03 + w0 * x3
                a10, a11, a12, a13 = a10 + w1 * x0, a11 + w1 * x1, a12 + w1 * x2, a13 + w1 * x3
                a20, a21, a22, a23 = a20 + w2 * x0, a21 + w2 * x1, a22 + w2 * x2, a23 + w2 * x3
                a30, a31, a32, a33 = a30 + w3 * x0, a31 + w3 * x1, a32 + w3 * x2, a33 + w3 * x3
            for column, s0, s1, s2, s3 in (
                (j, a00, a01, a02, a03), (j1, a10, a11, a12, a13), (j2, a20, a21, a22, a23), (j3, a30, a31, a32, a33)
            ):  # fmt: skip
                by = scale[column * (len(scale) > 1)]
                y[i * n + column], y[i1 * n + column] = s0 * by, s1 * by
                y[i2 * n + column], y[i3 * n + column] = s2 * by, s3 * by


@compiled
def _normed(x, weight, eps, m, k):  # pragma: no cover, machine code
    """x / rms(x) * weight of each of m rows."""
    out = np.empty(m * k, np.float32)
    for i in range(m):
        row, to, squares = x[i * k : i * k + k], out[i * k : i * k + k], np.float32(0)
        for c in range(k):
            squares += row[c] * row[c]
        by = np.float32(1) / math.sqrt(squares / np.float32(k) + eps)
        for c in range(k):
            to[c] = row[c] * by * weight[c]
    return out


@compiled
def _finish(y, residual, is_squared, is_added, m, n, first, last):  # pragma: no cover, machine code
    """relu(y)^2 and residual + y, in place, for some columns."""
    for i in range(m):
        row, added = y[i * n + first : i * n + last], residual[i * n + first : i * n + last]
        if is_squared:
            for j in range(len(row)):
                positive = max(row[j], np.float32(0)) if row[j] == row[j] else row[j]
                row[j] = positive * positive
        if is_added:
            for j in range(len(row)):
                row[j] += added[j]
