"""Attention of one token per row over all keys in the cache, on a CPU: keys and values are read once. Needs Numba.

Queries that share a key head are computed together. Keys and values are fp32 or bf16, sums and weights fp32. PyTorch's
own takes twice as long on one thread (16 heads, 4 of keys), and all threads however short the context is.

    b batch, h heads, v key heads, r heads per key head, l keys, d head_dim
"""

import numpy as np
import torch
from torch import Tensor

from .numba_compile import carray, compiled, exponential, pointer, rounded, widened

ATTENTION = 2  # in numba_run.py


def attention_of(
    query: Tensor, new: tuple[Tensor, Tensor], key: Tensor, value: Tensor, scaling: float, out: Tensor
) -> tuple:
    """The operation (numba_run.py) query (b, h * d) -> out (b, h * d).

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


@compiled
def attention_part(ints, reals, part, parts):  # pragma: no cover, machine code
    """One part of the rows' key heads of `attention_of`; tensors are addresses, strides in elements."""
    query, new_key, new_value, keys, values, is_bf16 = ints[0], ints[1], ints[2], ints[3], ints[4], ints[5]
    row, head, stride, value_row, value_head, value_stride = ints[6], ints[7], ints[8], ints[9], ints[10], ints[11]
    out, b, h, v, length, d = ints[12], ints[13], ints[14], ints[15], ints[16], ints[17]
    r, size, by = h // v, 2 if is_bf16 else 4, np.float32(reals[0])
    spread, value_spread = (length - 1) * stride + d, (length - 1) * value_stride + d
    for job in range(b * v * part // parts, b * v * (part + 1) // parts):
        i, j = job // v, job % v
        q = carray(pointer(query + job * r * d * 4), (r, d), np.float32).copy()
        to = carray(pointer(out + job * r * d * 4), (r, d), np.float32)
        k, x = pointer(keys + (i * row + j * head) * size), pointer(values + (i * value_row + j * value_head) * size)
        own_key = carray(pointer(new_key + job * d * 4), d, np.float32)
        own_value = carray(pointer(new_value + job * d * 4), d, np.float32)
        if is_bf16:
            k16, x16 = carray(k, spread, np.uint16), carray(x, value_spread, np.uint16)
            _write(own_key, k16[spread - d :])
            _write(own_value, x16[value_spread - d :])
            _attend(q, k16, x16, stride, value_stride, length, d, by, to)
        else:
            k32, x32 = carray(k, spread, np.float32), carray(x, value_spread, np.float32)
            _write(own_key, k32[spread - d :])
            _write(own_value, x32[value_spread - d :])
            _attend(q, k32, x32, stride, value_stride, length, d, by, to)


@compiled
def _write(values, to):  # pragma: no cover, machine code
    for i in range(len(values)):
        to[i] = rounded(values[i], to)


@compiled
def _attend(query, keys, values, stride, value_stride, length, d, scaling, out):  # pragma: no cover, machine code
    """query and out (r, d); keys and values from the first one's on, `stride` apart."""
    r = len(query)
    scores = np.empty((r, length), np.float32)
    for i in range(0, r, 4):
        i1, i2, i3 = min(i + 1, r - 1), min(i + 2, r - 1), min(i + 3, r - 1)
        q0, q1, q2, q3 = query[i], query[i1], query[i2], query[i3]
        for t in range(length):
            key = keys[t * stride : t * stride + d]
            s0 = s1 = s2 = s3 = np.float32(0)
            for c in range(d):
                x = widened(key[c])
                s0, s1, s2, s3 = s0 + x * q0[c], s1 + x * q1[c], s2 + x * q2[c], s3 + x * q3[c]
            scores[i, t], scores[i1, t] = s0 * scaling, s1 * scaling
            scores[i2, t], scores[i3, t] = s2 * scaling, s3 * scaling
    for i in range(r):
        row, most, total = scores[i], np.float32(-np.inf), np.float32(0)
        for t in range(length):
            most = max(most, row[t])
        for t in range(length):
            weight = exponential(row[t] - most)
            row[t] = weight
            total += weight
        for c in range(d):
            out[i, c] = np.float32(0)
        query[i, 0] = np.float32(1) / total  # no longer needed
    for t in range(length):
        value = values[t * value_stride : t * value_stride + d]
        for i in range(r):
            weight, to = scores[i, t], out[i]
            for c in range(d):
                to[c] += weight * widened(value[c])
    for i in range(r):
        for c in range(d):
            out[i, c] *= query[i, 0]
