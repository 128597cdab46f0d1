"""One token per row on a CPU: everything between in_proj and out_proj in one call, compiled by Numba.

PyTorch needs three dozen operations for a Mamba layer's token, each of which forks and joins threads for a few
microseconds of work. Groups of heads are independent: here one thread takes a row's group through the convolution, the
step sizes, the state and the gated norm, and reads its state once.

Importing this file compiles; the first time this takes a few seconds (numba_compile.py).

    b batch, h heads, p head_dim, g groups, r heads per group, n state, d channels (x, then B, then C), k taps
"""

import math

import numpy as np
from torch import Tensor

from .numba_compile import compiled, prange


@compiled(
    "void(float32[:,::1], float32[:,:,:], float32[:,:,:,::1], float32[:,:], float32[:], float32[:], float32[:], float32[:], "
    "float32[:], float32, float32, float32, int64, float32[:,::1])"
)
def _step(projected, windows, states, taps, bias, A_log, D, dt_bias, weight, eps, low, high, g, out):
    (b, h, p, n), k = states.shape, taps.shape[1]
    r, inner = h // g, h * p
    width = r * p
    for job in prange(b * g):
        row, group = job // g, job % g
        x, B, C = np.empty(width, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
        for part, first, channels in (
            (x, group * width, width), (B, inner + group * n, n), (C, inner + g * n + group * n, n)
        ):  # fmt: skip
            for i in range(channels):
                channel = first + i
                total = bias[channel]
                for tap in range(k - 1):
                    value = windows[row, channel, tap + 1]
                    windows[row, channel, tap] = value
                    total += value * taps[channel, tap]
                value = projected[row, inner + channel]
                windows[row, channel, k - 1] = value
                total += value * taps[channel, k - 1]
                part[i] = total / (np.float32(1) + math.exp(-total))
        squares = np.float32(0)
        for i in range(r):
            head = group * r + i
            dt = projected[row, projected.shape[1] - h + head] + dt_bias[head]
            dt = min(max(dt if dt > np.float32(20) else math.log1p(math.exp(dt)), low), high)
            decay = math.exp(-dt * math.exp(A_log[head]))
            for j in range(p):
                state, value = states[row, head, j], dt * x[i * p + j]
                y = np.float32(0)
                for c in range(n):
                    now = state[c] * decay + value * B[c]
                    state[c] = now
                    y += now * C[c]
                channel = head * p + j
                gate = projected[row, channel]
                y = (y + D[head] * x[i * p + j]) * (gate / (np.float32(1) + math.exp(-gate)))
                out[row, channel] = y
                squares += y * y
        scale = np.float32(1) / math.sqrt(squares / np.float32(width) + eps)
        for channel in range(group * width, (group + 1) * width):
            out[row, channel] *= scale * weight[channel]


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
    """`triton_decode.step` where all of it is fp32 on a CPU; ssm_state has to be contiguous."""
    taps, bias = conv
    bias = taps.new_zeros(len(taps)) if bias is None else bias
    weight, eps = norm
    out = projected.new_empty(len(projected), len(weight))
    weights = (tensor.detach().numpy() for tensor in (taps, bias, *heads, weight))
    projected = projected.detach().contiguous()
    _step(projected.numpy(), conv_state.numpy(), ssm_state.numpy(), *weights, eps, *limit, groups, out.numpy())
    return out
