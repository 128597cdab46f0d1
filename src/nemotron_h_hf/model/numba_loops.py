"""The loops of a token on a CPU that Numba compiles: products of few rows, a Mamba layer's token, attention of a token.

An operation is a row of integers (sizes, and tensors as addresses, 0 for none) and one of floats, which numba_run.py makes.
`on_one_thread` and `on_threads`, given `part_at.address`, run operations one after the other, the parts of each in any
order.
"""

import math

import numpy as np

from .numba_compile import compiled, compiled_for_c, compiled_for_threads
from .numba_dot import HAS_DOT, dot_1, dot_2, dot_4
from .numba_dot import STEP as STEP_OF_DOT

try:  # inside `try`, for readers that check the imports of pushed model code
    from numba import carray, prange, types
    from numba.core.cgutils import ir, voidptr_t
    from numba.extending import intrinsic, overload
except ImportError as missing:
    raise ImportError("the compiled steps of a CPU need numba; pip install numba") from missing

PRODUCT, STEP, ATTENTION, NORM = range(4)
MOST_INTS, MOST_REALS = 21, 3  # of an operation


@compiled
def part_of(which, ints, reals, part, parts):  # pragma: no cover, machine code
    if which == PRODUCT:
        product_part(ints, reals, part, parts)
    elif which == STEP:
        step_part(ints, reals, part, parts)
    elif which == ATTENTION:
        attention_part(ints, reals, part, parts)
    elif which == NORM:
        norm_part(ints, reals, part, parts)


@compiled
def on_one_thread(code, which, ints, reals, part, parts):  # pragma: no cover, machine code
    for i in range(len(which)):
        call(code, which[i], ints + i * 8 * MOST_INTS, reals + i * 8 * MOST_REALS, part, parts)


@compiled_for_threads
def on_threads(code, which, ints, reals, parts):  # pragma: no cover, machine code
    for i in range(len(which)):
        for part in prange(parts):
            call(code, which[i], ints + i * 8 * MOST_INTS, reals + i * 8 * MOST_REALS, part, parts)


# The product of rows x (m, k) and a matrix (n, k): each weight is read once and becomes fp32 in a register


@compiled
def product_part(ints, reals, part, parts):  # pragma: no cover, machine code
    """One part of the columns of `product_of`."""
    x, residual, y, m, n, k = ints[0], ints[1], ints[2], ints[3], ints[4], ints[5]
    kind, norm, norm_is_bf16, w, stride, scale, is_squared = (
        ints[6],
        ints[7],
        ints[8],
        ints[9],
        ints[10],
        ints[11],
        ints[12],
    )
    first, last = n * part // parts, n * (part + 1) // parts
    inputs, outputs = carray(pointer(x), (m, k), np.float32), carray(pointer(y), (m, n), np.float32)
    if norm != 0:
        inputs = _normed(inputs, floats(norm, norm_is_bf16, k), np.float32(reals[0]))
    rows = np.empty(0, np.int64)
    if ints[13] != 0:
        rows = carray(pointer(ints[13]), n, np.int64)
    if ints[14] != 0:
        inputs = _gathered(inputs, carray(pointer(ints[14]), k, np.int64))
    if kind == 0:
        _multiply(inputs, carray(pointer(w), (n, stride), np.float32), rows, outputs, first, last)
    elif kind == 1:
        halves = carray(pointer(w), (n, stride), np.uint16)
        if HAS_DOT:
            _multiply_bf16(inputs, halves, rows, outputs, first, last)
        else:
            _multiply(inputs, halves, rows, outputs, first, last)
    else:
        integers, step = carray(pointer(w), (n, stride), np.int8), np.float32(0)
        if m == 1:
            step = _step_of_int16(inputs)
        if step > 0:
            _multiply_integers(inputs, step, integers, rows, outputs, first, last)
        else:
            _multiply(inputs, integers, rows, outputs, first, last)
    scales, added = np.empty(0, np.float32), np.empty((0, 0), np.float32)
    if scale != 0:
        scales = carray(pointer(scale), n, np.float32)
    if residual != 0:
        added = carray(pointer(residual), (m, n), np.float32)
    _finish(outputs, scales, is_squared, added, first, last)


@compiled
def _gathered(x, places):  # pragma: no cover, machine code
    m, k = x.shape
    out = np.empty((m, k), np.float32)
    for i in range(m):
        for c in range(k):
            out[i, c] = x[i, places[c]]
    return out


@compiled
def _multiply(x, w, rows, y, first, last):  # pragma: no cover, machine code
    """Columns first..last of y (m, n) = x (m, k) times rows of w (n, k or more), in the order `rows` if it is not empty."""
    m, k = x.shape
    if m == 1:
        for j in range(first, last):
            r, total = rows[j] if len(rows) else j, np.float32(0)
            for c in range(k):
                total += x[0, c] * widened(w[r, c])
            y[0, j] = total
        return
    for j in range(first, last, 4):  # 4 x 4 sums fill the registers; at an edge some are computed twice
        j1, j2, j3 = min(j + 1, last - 1), min(j + 2, last - 1), min(j + 3, last - 1)
        r, r1, r2, r3 = j, j1, j2, j3
        if len(rows):
            r, r1, r2, r3 = rows[j], rows[j1], rows[j2], rows[j3]
        for i in range(0, m, 4):
            i1, i2, i3 = min(i + 1, m - 1), min(i + 2, m - 1), min(i + 3, m - 1)
            a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = np.float32(0)
            a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = np.float32(0)
            for c in range(k):
                w0, w1, w2, w3 = widened(w[r, c]), widened(w[r1, c]), widened(w[r2, c]), widened(w[r3, c])
                x0, x1, x2, x3 = x[i, c], x[i1, c], x[i2, c], x[i3, c]
                a00, a01, a02, a03 = a00 + w0 * x0, a01 + w0 * x1, a02 + w0 * x2, a03 + w0 * x3
                a10, a11, a12, a13 = a10 + w1 * x0, a11 + w1 * x1, a12 + w1 * x2, a13 + w1 * x3
                a20, a21, a22, a23 = a20 + w2 * x0, a21 + w2 * x1, a22 + w2 * x2, a23 + w2 * x3
                a30, a31, a32, a33 = a30 + w3 * x0, a31 + w3 * x1, a32 + w3 * x2, a33 + w3 * x3
            y[i, j], y[i1, j], y[i2, j], y[i3, j] = a00, a01, a02, a03
            y[i, j1], y[i1, j1], y[i2, j1], y[i3, j1] = a10, a11, a12, a13
            y[i, j2], y[i1, j2], y[i2, j2], y[i3, j2] = a20, a21, a22, a23
            y[i, j3], y[i1, j3], y[i2, j3], y[i3, j3] = a30, a31, a32, a33


@compiled
def _multiply_bf16(x, w, rows, y, first, last):  # pragma: no cover, machine code
    """As `_multiply` of bf16 weights, by numba_dot.py: an input of one row or two is the sum of two bf16 numbers, to 2^-17 of it;
    of more rows the nearest bf16 number, as where torch multiplies."""
    m, k = x.shape
    pieces, padded = 2 if m <= 2 else 1, m if m <= 2 else (m + 3) // 4 * 4
    halves, sums = np.zeros((padded, pieces, k), np.uint16), np.empty(padded, np.float32)
    for i in range(m):
        for c in range(k):
            halves[i, 0, c] = _bfloat16_bits(x[i, c])
            if pieces == 2:
                halves[i, 1, c] = _bfloat16_bits(x[i, c] - widened(halves[i, 0, c]))
    behind, steps = 2 * k, k // STEP_OF_DOT
    for j in range(first, last):
        r = rows[j] if len(rows) else j
        given, weights, to = (
            halves.ctypes.data,
            w.ctypes.data + r * w.strides[0],
            sums.ctypes.data,
        )  # named here: they live on
        if m == 1:
            dot_1(given, behind, weights, steps, to)
        elif m == 2:
            dot_2(given, behind, weights, steps, to)
        else:
            for i in range(0, padded, 4):
                dot_4(given + i * behind, behind, weights, steps, to + 4 * i)
        for i in range(m):
            total = sums[i]
            for c in range(steps * STEP_OF_DOT, k):
                total += x[i, c] * widened(w[r, c])
            y[i, j] = total


@compiled
def _step_of_int16(x):  # pragma: no cover, machine code
    """What x (1, k) is divided by to become integers of 16 bits, so large that the sum of their products with any int8 weights
    fits into 32 bits. 0 where there is none (zeros, infinities, NaN, very small numbers), or if one input is so much larger
    than the rest that rounding to bfloat16 would be more exact."""
    k = x.shape[1]
    most = total = np.float32(0)
    for c in range(k):
        size = abs(x[0, c])
        total += size
        most = max(most, size)
    step = max(most / np.float32(32766), total * np.float32(1.001) / np.float32(max(1, (1 << 24) - k)))
    return step if np.float32(1e-30) < step < np.float32(0.002) * total / np.float32(k) else np.float32(0)


@compiled
def _multiply_integers(x, step, w, rows, y, first, last):  # pragma: no cover, machine code
    """As `_multiply` of one row and int8 weights, its inputs rounded to multiples of `step`: on AVX2 and AVX-512 the loop
    becomes `vpmaddwd`, a third of the instructions that making fp32 of each weight takes."""
    k = x.shape[1]
    by, rounded_x = np.float32(1) / step, np.empty(k, np.int16)
    for c in range(k):
        value = x[0, c] * by
        rounded_x[c] = np.int32(value + (np.float32(0.5) if value > 0 else np.float32(-0.5)))
    for j in range(first, last):
        r = rows[j] if len(rows) else j
        y[0, j] = np.float32(_integer_dot(rounded_x, w, r)) * step


@compiled
def _integer_dot(x, w, r):  # pragma: no cover, machine code
    total = np.int32(0)
    for c in range(len(x)):  # every step in 32 bits: Numba's integers would be of 64
        total = np.int32(total + np.int32(np.int32(w[r, c]) * np.int32(x[c])))
    return total


@compiled
def norm_part(ints, reals, part, parts):  # pragma: no cover, machine code
    """One part of the rows of `norm_of`."""
    x, y, m, k, norm, norm_is_bf16 = ints[0], ints[1], ints[2], ints[3], ints[4], ints[5]
    first, count = m * part // parts, m * (part + 1) // parts - m * part // parts
    given, to = pointer(x + first * k * 4), pointer(y + first * k * 4)
    normed = _normed(carray(given, (count, k), np.float32), floats(norm, norm_is_bf16, k), np.float32(reals[0]))
    carray(to, (count, k), np.float32)[:] = normed


@compiled
def _normed(x, weight, eps):  # pragma: no cover, machine code
    """x / rms(x) * weight of each row."""
    m, k = x.shape
    out = np.empty((m, k), np.float32)
    for i in range(m):
        squares = np.float32(0)
        for c in range(k):
            squares += x[i, c] * x[i, c]
        by = np.float32(1) / math.sqrt(squares / np.float32(k) + eps)
        for c in range(k):
            out[i, c] = x[i, c] * by * weight[c]
    return out


@compiled
def _finish(y, scales, is_squared, added, first, last):  # pragma: no cover, machine code
    """y times scales, relu(y)^2, y + added: what there is of it, in place, for some columns."""
    for i in range(len(y)):
        if len(scales):
            for j in range(first, last):
                y[i, j] *= scales[j]
        if is_squared:
            for j in range(first, last):
                positive = y[i, j] if not y[i, j] < np.float32(0) else np.float32(0)  # NaN stays
                y[i, j] = positive * positive
        if len(added):
            for j in range(first, last):
                y[i, j] += added[i, j]


# A Mamba layer between in_proj and out_proj: a row's group of heads at a time, which reads its state once
#     b batch, h heads, p head_dim, g groups, r heads per group, n state, d channels (x, then B, then C), k taps


@compiled
def step_part(ints, reals, part, parts):  # pragma: no cover, machine code
    """One part of the rows' groups of `step_of`; tensors are addresses."""
    projected, window, row_stride, stride, tap_stride, is_bf16 = ints[0], ints[1], ints[2], ints[3], ints[4], ints[5]
    states, out, b, h, p, n, k = ints[6], ints[7], ints[8], ints[9], ints[10], ints[11], ints[12]
    bf16, g = ints[19], ints[20]
    d = h * p + 2 * g * n
    width, size = h * p + d + h, 2 if is_bf16 else 4
    taps = floats(ints[13], bf16 & 1, d * k).reshape(d, k)
    bias = np.zeros(d, np.float32)
    if ints[14] != 0:
        bias = floats(ints[14], bf16 & 2, d)
    A_log, D, dt_bias = floats(ints[15], bf16 & 4, h), floats(ints[16], bf16 & 8, h), floats(ints[17], bf16 & 16, h)
    weight = floats(ints[18], bf16 & 32, h * p)
    eps, low, high = np.float32(reals[0]), np.float32(reals[1]), np.float32(reals[2])
    for job in range(b * g * part // parts, b * g * (part + 1) // parts):
        row, group = job // g, job % g
        given = carray(pointer(projected + row * width * 4), width, np.float32)
        state = carray(pointer(states + row * h * p * n * 4), (h, p, n), np.float32)
        to = carray(pointer(out + row * h * p * 4), h * p, np.float32)
        start, strides = window + row * row_stride * size, (stride * size, tap_stride * size)
        if is_bf16:
            held = np.lib.stride_tricks.as_strided(carray(pointer(start), 1, np.uint16), (d, k), strides)
            _step_group(given, held, state, taps, bias, A_log, D, dt_bias, weight, eps, low, high, g, group, to)
        else:
            kept = np.lib.stride_tricks.as_strided(carray(pointer(start), 1, np.float32), (d, k), strides)
            _step_group(given, kept, state, taps, bias, A_log, D, dt_bias, weight, eps, low, high, g, group, to)


@compiled
def _convolve(window, taps, bias, inputs, out):  # pragma: no cover, machine code
    """SiLU of the convolution of some channels; window (channels, k) moves on by one input."""
    k = taps.shape[1]
    for channel in range(len(out)):
        total = bias[channel]
        for tap in range(k - 1):
            value = window[channel, tap + 1]
            window[channel, tap] = value
            total += widened(value) * taps[channel, tap]
        window[channel, k - 1] = rounded(inputs[channel], window)
        out[channel] = total + inputs[channel] * taps[channel, k - 1]
    for channel in range(len(out)):
        out[channel] = _silu(out[channel])


@compiled
def _silu(x):  # pragma: no cover, machine code
    return x / (np.float32(1) + exponential(-x))


@compiled
def _step_group(
    projected, window, states, taps, bias, A_log, D, dt_bias, weight, eps, low, high, g, group, out
):  # pragma: no cover, machine code
    """One row's group: projected (gate + d + h), window (d, k), states (h, p, n), out (h * p)."""
    (h, p, n), d = states.shape, len(taps)
    r, inner = h // g, h * p
    width = r * p
    x, B, C = np.empty(width, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    for part, first in ((x, group * width), (B, inner + group * n), (C, inner + g * n + group * n)):
        last, inputs = first + len(part), projected[inner : inner + d]
        _convolve(window[first:last], taps[first:last], bias[first:last], inputs[first:last], part)
    squares = np.float32(0)
    for i in range(r):
        head = group * r + i
        dt = projected[inner + d + head] + dt_bias[head]
        dt = min(max(dt if dt > np.float32(20) else math.log1p(math.exp(dt)), low), high)
        decay = math.exp(-dt * math.exp(A_log[head]))
        for j in range(p):
            state, value = states[head, j], dt * x[i * p + j]
            y = np.float32(0)
            for c in range(n):
                now = state[c] * decay + value * B[c]
                state[c] = now
                y += now * C[c]
            out[head * p + j] = y + D[head] * x[i * p + j]
    for channel in range(group * width, (group + 1) * width):
        y = out[channel] * _silu(projected[channel])
        out[channel] = y
        squares += y * y
    scale = np.float32(1) / math.sqrt(squares / np.float32(width) + eps)
    for channel in range(group * width, (group + 1) * width):
        out[channel] *= scale * weight[channel]


# Attention of one token per row: queries that share a key head together, keys and values read once
#     b batch, h heads, v key heads, r heads per key head, l keys, d head_dim


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


# What loops read and compute with


@intrinsic
def call(_context, _code, _which, _ints, _reals, _part, _parts):
    """`part_at` by its address: what calls it is compiled without it, in a second instead of ten."""

    def generate(_context, builder, _signature, arguments):
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 5)
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])

    return types.void(*[types.int64] * 6), generate


@intrinsic
def pointer(_context, address):
    """The memory at an address (an int64), for `numba.carray`."""

    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], voidptr_t)

    return types.voidptr(types.int64), generate


def widened(value):
    """A weight or an input as fp32: int8 as it is, uint16 as the bits of a bfloat16. For compiled code."""


@overload(widened, inline="always")
def _widened(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: np.float32(value)


def rounded(value, like):
    """fp32 as it is, or as the bits of the nearest bfloat16 where `like` is an array of those. For compiled code."""


@overload(rounded, inline="always")
def _rounded(value, like):
    if like.dtype == types.uint16:
        return lambda value, like: _bfloat16_bits(value)
    return lambda value, like: value


@compiled
def exponential(x):  # pragma: no cover, machine code
    """exp(x) in fp32 to 3e-7 of it, from -87 to 88 (further out the value there), in operations that fill vector
    registers: the library's function takes one value at a time."""
    given, x = x, min(max(x, np.float32(-87)), np.float32(88))
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)  # ln 2 in two parts
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    p = p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p if given == given else given


@compiled
def _bfloat16_bits(value):  # pragma: no cover, machine code
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))  # stays NaN
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@compiled
def floats(address, is_bf16, size):  # pragma: no cover, machine code
    """The fp32 values at an address, or a copy of the bfloat16 ones."""
    if not is_bf16:
        return carray(pointer(address), size, np.float32)
    held, out = carray(pointer(address), size, np.uint16), np.empty(size, np.float32)
    for i in range(size):
        out[i] = widened(held[i])
    return out


# At the end: it is compiled here and now


@compiled_for_c("void(int64, int64, int64, int64, int64)")
def part_at(which, ints, reals, part, parts):  # pragma: no cover, machine code
    """`part_of` with the addresses of its rows."""
    part_of(
        which, carray(pointer(ints), MOST_INTS, np.int64), carray(pointer(reals), MOST_REALS, np.float64), part, parts
    )
