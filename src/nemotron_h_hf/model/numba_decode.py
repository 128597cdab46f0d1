"""One token per row on a CPU: everything between in_proj and out_proj in one compiled loop. Needs Numba.

PyTorch needs three dozen operations for a Mamba layer's token, each of which forks and joins threads for a few
microseconds of work. Groups of heads are independent: here one thread takes a row's group through the convolution, the
step sizes, the state and the gated norm, and reads its state once. States and sums are fp32; weights and the
convolution's window may be bf16.

    b batch, h heads, p head_dim, g groups, r heads per group, n state, d channels (x, then B, then C), k taps
"""

import math

import numpy as np
import torch
from torch import Tensor

from .numba_compile import carray, compiled, exponential, floats, pointer, rounded, widened

STEP = 1  # in numba_run.py


def step_of(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: tuple[Tensor | None, ...],
    groups: int,
    limits: tuple[float, float, float],
    out: Tensor,
) -> tuple:
    """The operation (numba_run.py) in_proj's output (b, gate + d + h) -> out_proj's input (b, h * p); updates the states.

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


@compiled
def step_part(ints, reals, part, parts):  # pragma: no cover, machine code
    """One part of the rows' groups of `step_of`; tensors are addresses."""
    projected, window, row_stride, stride, tap_stride, is_bf16 = ints[0], ints[1], ints[2], ints[3], ints[4], ints[5]
    states, bf16, out = ints[6], ints[13], ints[14]
    b, h, p, n, g, k = ints[15], ints[16], ints[17], ints[18], ints[19], ints[20]
    d = h * p + 2 * g * n
    width, size = h * p + d + h, 2 if is_bf16 else 4
    taps = floats(ints[7], bf16 & 1, d * k).reshape(d, k)
    bias = np.zeros(d, np.float32)
    if ints[8] != 0:
        bias = floats(ints[8], bf16 & 2, d)
    A_log, D, dt_bias = floats(ints[9], bf16 & 4, h), floats(ints[10], bf16 & 8, h), floats(ints[11], bf16 & 16, h)
    weight = floats(ints[12], bf16 & 32, h * p)
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
