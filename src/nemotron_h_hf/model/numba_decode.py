"""One token per row on a CPU: everything between in_proj and out_proj in one call, compiled by Numba.

PyTorch needs three dozen operations for a Mamba layer's token, each of which forks and joins threads for a few
microseconds of work. Groups of heads are independent: here one thread takes a row's group through the convolution, the
step sizes, the state and the gated norm, and reads its state once. Inputs and states are fp32; the convolution's window
may be bf16.

    b batch, h heads, p head_dim, g groups, r heads per group, n state, d channels (x, then B, then C), k taps
"""

import math

import numpy as np
import torch
from torch import Tensor

from .numba_compile import Kernel, carray, compiled, compiled_for_threads, pointer, prange, rounded, widened


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
        total += inputs[channel] * taps[channel, k - 1]
        out[channel] = total / (np.float32(1) + math.exp(-total))


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
            channel = head * p + j
            gate = projected[channel]
            y = (y + D[head] * x[i * p + j]) * (gate / (np.float32(1) + math.exp(-gate)))
            out[channel] = y
            squares += y * y
    scale = np.float32(1) / math.sqrt(squares / np.float32(width) + eps)
    for channel in range(group * width, (group + 1) * width):
        out[channel] *= scale * weight[channel]


@compiled
def _part(
    projected, window, row_stride, stride, tap_stride, is_bf16, states, taps, bias, A_log, D, dt_bias, weight, out,
    b, h, p, n, g, k, eps, low, high, part, parts,
):  # fmt: skip  # pragma: no cover, machine code
    """One part of the rows' groups; tensors are addresses."""
    d = h * p + 2 * g * n
    width, size = h * p + d + h, 2 if is_bf16 else 4
    taps, bias = carray(pointer(taps), (d, k), np.float32), carray(pointer(bias), d, np.float32)
    A_log, D = carray(pointer(A_log), h, np.float32), carray(pointer(D), h, np.float32)
    dt_bias, weight = carray(pointer(dt_bias), h, np.float32), carray(pointer(weight), h * p, np.float32)
    for job in range(b * g * part // parts, b * g * (part + 1) // parts):
        row, group = job // g, job % g
        given = carray(pointer(projected + row * width * 4), width, np.float32)
        state = carray(pointer(states + row * h * p * n * 4), (h, p, n), np.float32)
        to = carray(pointer(out + row * h * p * 4), h * p, np.float32)
        start, strides = window + row * row_stride * size, (stride * size, tap_stride * size)
        eps32, low32, high32 = np.float32(eps), np.float32(low), np.float32(high)
        if is_bf16:
            held = np.lib.stride_tricks.as_strided(carray(pointer(start), 1, np.uint16), (d, k), strides)
            _step_group(given, held, state, taps, bias, A_log, D, dt_bias, weight, eps32, low32, high32, g, group, to)
        else:
            kept = np.lib.stride_tricks.as_strided(carray(pointer(start), 1, np.float32), (d, k), strides)
            _step_group(given, kept, state, taps, bias, A_log, D, dt_bias, weight, eps32, low32, high32, g, group, to)


@compiled_for_threads
def _all_parts(
    projected, window, row_stride, stride, tap_stride, is_bf16, states, taps, bias, A_log, D, dt_bias, weight, out,
    b, h, p, n, g, k, eps, low, high, parts,
):  # fmt: skip  # pragma: no cover, machine code
    for part in prange(parts):
        _part(
            projected, window, row_stride, stride, tap_stride, is_bf16, states, taps, bias, A_log, D, dt_bias, weight,
            out, b, h, p, n, g, k, eps, low, high, part, parts,
        )  # fmt: skip


_step = Kernel(_part, _all_parts)


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
    """`triton_decode.step` on a CPU; ssm_state has to be fp32 and contiguous, conv_state fp32 or bf16."""
    (taps, bias), (weight, eps) = conv, norm
    bias = taps.new_zeros(len(taps)) if bias is None else bias
    dtype = projected.dtype
    given = [tensor.detach().float().contiguous() for tensor in (projected, taps, bias, *heads, weight)]
    out = torch.empty(len(projected), len(weight))
    projected, *weights = (tensor.data_ptr() for tensor in given)
    _step(
        ssm_state.numel() * 4, projected, conv_state.data_ptr(), *conv_state.stride(),
        int(conv_state.dtype == torch.bfloat16), ssm_state.data_ptr(), *weights, out.data_ptr(),
        *ssm_state.shape, groups, taps.shape[1], eps, *limit,
    )  # fmt: skip
    return out.to(dtype)
