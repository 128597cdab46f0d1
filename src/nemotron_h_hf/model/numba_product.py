"""The product of a few rows and a matrix of fp32, bf16 or int8 weights on a CPU, at the speed of its memory. Needs Numba.

For one row torch reads fp32 weights at two thirds of the memory's speed, bf16 ones at a third; by torchao's int8 weights
it multiplies by making them fp32 first, every time. Here each weight is read once, as it is stored, and becomes fp32 in a
register; sums are fp32 (docs/results/few_rows, docs/results/int8).

    m rows, k input channels, n output channels
"""

import numpy as np
import torch
from torch import Tensor, nn

from .numba_compile import Kernel, carray, compiled, compiled_for_threads, pointer, prange, widened

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


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
def _part(kind, x, w, stride, scale, y, m, n, k, part, parts):  # pragma: no cover, machine code
    """One part of the columns; x, w, scale (0 for none) and y are addresses."""
    first, last = n * part // parts, n * (part + 1) // parts
    inputs, outputs = carray(pointer(x), m * k, np.float32), carray(pointer(y), m * n, np.float32)
    by, size = np.ones(1, np.float32), (n - 1) * stride + k
    if scale != 0:
        by = carray(pointer(scale), n, np.float32)
    if kind == 0:
        _multiply(inputs, carray(pointer(w), size, np.float32), stride, by, outputs, m, n, k, first, last)
    elif kind == 1:
        _multiply(inputs, carray(pointer(w), size, np.uint16), stride, by, outputs, m, n, k, first, last)
    else:
        _multiply(inputs, carray(pointer(w), size, np.int8), stride, by, outputs, m, n, k, first, last)


@compiled_for_threads
def _all_parts(kind, x, w, stride, scale, y, m, n, k, parts):  # pragma: no cover, machine code
    for part in prange(parts):
        _part(kind, x, w, stride, scale, y, m, n, k, part, parts)


_product = Kernel(_part, _all_parts)


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


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., k) in any floating dtype, weight (n, k) of fp32 or bf16 with rows of any distance, or an Int8Tensor that
    `can_read_int8` -> (..., n) in x's dtype; no gradients."""
    values, scale = (weight, None) if type(weight) in (Tensor, nn.Parameter) else (weight.qdata, weight.scale)
    if scale is not None:
        scale = scale.detach().float().contiguous()
    (n, k), rows = values.shape, x.detach().float().contiguous()
    m = rows.numel() // k
    y = rows.new_empty(*x.shape[:-1], n)
    _product(
        n * k * values.element_size(), KINDS[values.dtype], rows.data_ptr(), values.data_ptr(), values.stride(0),
        0 if scale is None else scale.data_ptr(), y.data_ptr(), m, n, k,
    )  # fmt: skip
    y = y if bias is None else y.add_(bias)
    return y if x.dtype == torch.float32 else y.to(x.dtype)
