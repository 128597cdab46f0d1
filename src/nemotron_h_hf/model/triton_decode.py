"""One token per row in Triton: `ssd.scan_step`, and everything between in_proj and out_proj in two launches.

Decoding is bound by reading the states, (h, p, n) in fp32 for each row, and before that by launches: PyTorch needs a dozen
small ones for a Mamba layer. `step` fuses them where the data allows it:

    scan_kernel   one program per row, head and few rows of the head's state: the convolution of the channels it needs, the
                  step size, the state in place, y
    norm_kernel   one program per row and group: the gated norm over the group's heads, and the convolution's window moves on

Not one launch, as the norm needs the y of all heads of its group: one program per group would leave 8 programs for the
4 MiB of a row of an 8B model, and a GPU has over a hundred multiprocessors. And the window moves in the second launch,
because all heads of a group read the channels of B and C in the first.

    b batch, h heads, p head_dim, g groups, r heads per group, n state, d channels (x, then B, then C), k taps
"""

import torch
from torch import Tensor

from .triton_conv import window, window_output
from .triton_launch import last_contiguous, on, padded, tl, triton

WINDOW = 256  # channels whose window moves on at a time
STATE_ROWS = 16  # of a head's state (p, n), in one program: small, because one row alone must keep a GPU busy


def scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`ssd.scan_step`; the state (b, h, p, n) is updated in place, y (b, h, p) comes in x's dtype."""
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    x, B, C = last_contiguous(x), last_contiguous(B), last_contiguous(C)
    y = x.new_empty(b, h, p)
    with on(x):
        step_kernel[(triton.cdiv(p, STATE_ROWS), h, b)](
            x, dt.contiguous(), A, B, C, D, state, y, *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], *state.stride(),
            H=h, P=p, R=h // g, N=n, BP=STATE_ROWS, BN=padded(n), num_warps=4,
        )  # fmt: skip
    return y, state


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
    """A Mamba layer's token, from in_proj's output to out_proj's input; both states are updated in place.

    Args:
        projected: (b, h*p + d + h) rows of gate, convolution inputs, step sizes.
        conv_state, ssm_state: (b, d, k), (b, h, p, n).
        conv: taps (d, k), bias (d) or None.
        heads: A_log, D, dt_bias, (h) each.
        norm: weight (h*p), eps.
        groups: g.
        limit: of the step sizes.

    Returns:
        (b, h*p) in projected's dtype.
    """
    (b, h, p, n), (d, k), g = ssm_state.shape, conv[0].shape, groups
    projected, (weight, bias), (A_log, D, dt_bias) = last_contiguous(projected), conv, heads
    y = projected.new_empty(b, h * p, dtype=torch.float32)
    out = projected.new_empty(b, h * p)
    known = {"H": h, "P": p, "R": h // g, "N": n, "K": k, "KP": triton.next_power_of_2(k)}
    block = triton.next_power_of_2(h // g * p)
    with on(projected):
        scan_kernel[(triton.cdiv(p, STATE_ROWS), h, b)](
            projected, conv_state, ssm_state, weight.contiguous(), bias, A_log, D, dt_bias, y, *limit,
            projected.stride(0), *conv_state.stride(), *ssm_state.stride(), **known, BP=STATE_ROWS, BN=padded(n),
            BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
        norm_kernel[(g, b)](
            projected, conv_state, y, norm[0], out, norm[1], projected.stride(0), *conv_state.stride(), **known,
            D=d, SHARE=triton.cdiv(d, g), BLOCK=block, WINDOW=WINDOW, num_warps=min(max(block // 256, 4), 16),
        )  # fmt: skip
    return out


@triton.jit
def advance(state, b, head, p, n, step, decay, x, B, C, sb, sh, sp, sn, P: tl.constexpr, N: tl.constexpr):
    """The recurrence of some rows p of one head's state, in place: the new state times C (rows)."""
    place = state + b * sb + head * sh + p[:, None] * sp + n[None, :] * sn
    mask = (p < P)[:, None] & (n < N)[None, :]
    new = tl.load(place, mask=mask, other=0.0).to(tl.float32) * decay + (step * x)[:, None] * B[None, :]
    tl.store(place, new.to(state.dtype.element_ty), mask=mask)
    return tl.sum(new * C[None, :], 1)


@triton.jit
def step_kernel(
    x, dt, A, B, C, D, state, y, xb, xh, Bb, Bg, Cb, Cg, sb, sh, sp, sn,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of P, H, b)."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)
    step = tl.load(dt + b * H + head).to(tl.float32)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    inputs = tl.load(x + b * xb + head * xh + p, mask=p < P, other=0.0).to(tl.float32)
    directions = tl.load(B + b * Bb + head // R * Bg + n, mask=n < N, other=0.0).to(tl.float32)
    reads = tl.load(C + b * Cb + head // R * Cg + n, mask=n < N, other=0.0).to(tl.float32)
    out = advance(state, b, head, p, n, step, decay, inputs, directions, reads, sb, sh, sp, sn, P, N)
    out += tl.load(D + head).to(tl.float32) * inputs
    tl.store(y + (b * H + head) * P + p, out.to(y.dtype.element_ty), mask=p < P)


@triton.jit
def convolved(
    conv_in, conv_state, weight, bias, b, first, offset, column, xb, cb, cd, ck,
    SIZE: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The convolution of the channels first + offset, offset < SIZE, rounded as the layer's own convolution rounds."""
    end, d = first + SIZE, tl.where(offset < SIZE, first + offset, first)
    seen = window(conv_in, conv_state, b, d, column, xb, cb, cd, ck, end, K)
    out = window_output(seen, weight, bias, d, column, end, K, BIAS)
    return tl.where(offset < SIZE, out.to(conv_in.dtype.element_ty).to(tl.float32), 0.0)


@triton.jit
def scan_kernel(
    projected, conv_state, ssm_state, weight, bias, A_log, D, dt_bias, y, low, high, xb, cb, cd, ck, sb, sh, sp, sn,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of P, H, b). Reads conv_state, updates ssm_state, writes y (b, H * P) in fp32."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n, column = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, KP)
    conv_in, group, groups = projected + H * P, head // R, H // R
    x = convolved(conv_in, conv_state, weight, bias, b, head * P, p, column, xb, cb, cd, ck, P, K, BIAS)
    B = convolved(conv_in, conv_state, weight, bias, b, H * P + group * N, n, column, xb, cb, cd, ck, N, K, BIAS)
    C_first = H * P + (groups + group) * N
    C = convolved(conv_in, conv_state, weight, bias, b, C_first, n, column, xb, cb, cd, ck, N, K, BIAS)
    raw = tl.load(projected + b * xb + 2 * H * P + 2 * groups * N + head).to(tl.float32)
    raw += tl.load(dt_bias + head).to(tl.float32)
    power = tl.exp(tl.minimum(raw, 20.0))
    rounded = 1 + power  # log(1 + power) off by what 1 + power was rounded by, for which the quotient makes up
    small = tl.where(rounded == 1, power, tl.log(rounded) * power / tl.where(rounded == 1, 1.0, rounded - 1))
    step = tl.where(raw > 20, raw, small)
    step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp(-step * tl.exp(tl.load(A_log + head).to(tl.float32)))
    out = advance(ssm_state, b, head, p, n, step, decay, x, B, C, sb, sh, sp, sn, P, N)
    out += tl.load(D + head).to(tl.float32) * x
    tl.store(y + (b * H + head) * P + p, out, mask=p < P)


@triton.jit
def norm_kernel(
    projected, conv_state, y, weight, out, eps, xb, cb, cd, ck,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    D: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (groups, b). Writes out (b, H * P); moves the window of SHARE of the D channels on."""
    group, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask, e = column < R * P, group * R * P + column
    z = tl.load(projected + b * xb + e, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(y + b * (H * P) + e, mask=mask, other=0.0) * z * tl.sigmoid(z)
    normed = v * tl.rsqrt(tl.sum(v * v, 0) / (R * P) + eps) * tl.load(weight + e, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + b * (H * P) + e, normed.to(out.dtype.element_ty), mask=mask)
    taps, end = tl.arange(0, KP), tl.minimum((group + 1) * SHARE, D)
    for start in range(0, SHARE, WINDOW):
        d = group * SHARE + start + tl.arange(0, WINDOW)
        seen = window(projected + H * P, conv_state, b, d, taps, xb, cb, cd, ck, end, K)
        tl.debug_barrier()
        place = conv_state + b * cb + d[:, None] * cd + taps[None, :] * ck
        tl.store(place, seen, mask=(d < end)[:, None] & (taps < K)[None, :])
