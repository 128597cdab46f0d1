"""`ssd.causal_conv` and `ssd.conv_step` in Triton: each channel's convolution over its own past, then SiLU.

With z_t = bias + sum over back < k of w[back] x_{t - back} and out_t = z_t sigmoid(z_t), the gradient of a token is the
convolution read the other way, dx_s = sum over back of w[back] dz_{s + back}, dz = dout * silu'(z), where z is computed
again from x: three more reads of a line that is in the cache cost less than a trip of dz through memory. Tokens before
the first, s in -(k - 1) .. -1, are the initial state's, and so is their gradient. Sums are fp32, whatever the inputs.

    b batch, l length, d channels, k taps; w[back] is tap k - 1 - back, `back` tokens before the current one
"""

import torch
from torch import Tensor

from .triton_launch import last_contiguous, on, tl, triton

TOKENS, CHANNELS = 64, 64  # of one program; a power of two each
GRADIENT_TOKENS = 32  # the same of the backward pass, which holds 2k - 1 tiles of inputs
PARTS = 16  # blocks of tokens whose share of the taps' gradient one program of the backward pass adds up
STEP_CHANNELS = 128


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """`ssd.causal_conv`: (b, l, d) in x's dtype, with the taps as they are stored."""
    seq_idx = None if seq_idx is None else seq_idx.int().contiguous()
    return CausalConv.apply(last_contiguous(x), weight, bias, initial_state, seq_idx)


def conv_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """`ssd.conv_step`: x (b, d), state (b, d, k) -> (b, d) and the next state, in the memory of `state` where asked for."""
    x, (b, d), taps = last_contiguous(x), x.shape, weight.shape[1]
    out, after = x.new_empty(b, d), state if in_place else torch.empty_like(state)
    with on(x):
        step_kernel[(triton.cdiv(d, STEP_CHANNELS), b)](
            x, weight.contiguous(), bias, state, after, out, x.stride(0), *state.stride(), *after.stride(),
            D=d, K=taps, KP=triton.next_power_of_2(taps), BD=STEP_CHANNELS, BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
    return out, after


class CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, seq_idx):
        (b, l, d), weight = x.shape, weight.contiguous()
        state = None if initial_state is None else initial_state.contiguous()
        out = x.new_empty(b, l, d)
        with on(x):
            forward_kernel[(triton.cdiv(d, CHANNELS), triton.cdiv(l, TOKENS), b)](
                x, weight, bias, state, seq_idx, out, l, *x.stride()[:2], **_sizes(weight, bias, state, seq_idx),
                BT=TOKENS,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, state, seq_idx)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight, bias, state, seq_idx = ctx.saved_tensors
        (b, l, d), taps = x.shape, weight.shape[1]
        parts = triton.cdiv(l + taps - 1, GRADIENT_TOKENS * PARTS)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dstate = None if state is None else torch.zeros_like(state)
        shares = x.new_empty(b, parts, taps + 1, d, dtype=torch.float32)  # of the taps' gradient, and of the bias's
        with on(x):
            backward_kernel[(triton.cdiv(d, CHANNELS), parts, b)](
                x, weight, bias, state, seq_idx, dout.contiguous(), dx, dstate, shares, l, parts, *x.stride()[:2],
                **_sizes(weight, bias, state, seq_idx), BT=GRADIENT_TOKENS,
                KP=triton.next_power_of_2(taps + 1), PARTS=PARTS,
            )  # fmt: skip
        sums = shares.sum((0, 1))  # (k + 1, d), the current token's tap first
        dweight = sums[:taps].flip(0).t().to(weight.dtype)
        return dx, dweight, None if bias is None else sums[taps].to(bias.dtype), dstate, None


def _sizes(weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None) -> dict[str, int]:
    d, taps = weight.shape
    given = {"BIAS": bias is not None, "STATE": state is not None, "DOCUMENTS": seq_idx is not None}
    return {"D": d, "K": taps, "BD": CHANNELS, "num_warps": 4, **given}


@triton.jit
def reads(
    x, state, seq_idx, b, t, back, d, l, xb, xl,
    D: tl.constexpr, K: tl.constexpr, STATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """(tokens, channels) what tokens t see `back` places before them: an input, the state, or nothing. fp32."""
    source = t - back
    seen = (t >= 0) & (t < l)
    if DOCUMENTS:  # the state belongs to the first token's document
        inside = tl.minimum(tl.maximum(source, 0), l - 1)
        now = tl.load(seq_idx + b * l + tl.minimum(tl.maximum(t, 0), l - 1))
        seen = seen & (tl.load(seq_idx + b * l + inside) == now)
    mask = (seen & (source >= 0))[:, None] & (d < D)[None, :]
    value = tl.load(x + b * xb + source.to(tl.int64)[:, None] * xl + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if STATE:
        mask = (seen & (source < 0))[:, None] & (d < D)[None, :]
        place = state + (b * D + d)[None, :] * K + (K + source)[:, None]
        value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def tap(weight, d, back, D: tl.constexpr, K: tl.constexpr):
    return tl.load(weight + d * K + (K - 1 - back), mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def weighted(
    x, weight, bias, state, seq_idx, b, t, d, l, xb, xl,
    D: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """z (tokens, channels), before SiLU."""
    z = reads(x, state, seq_idx, b, t, 0, d, l, xb, xl, D, K, STATE, DOCUMENTS) * tap(weight, d, 0, D, K)[None, :]
    for back in tl.static_range(1, K):
        seen = reads(x, state, seq_idx, b, t, back, d, l, xb, xl, D, K, STATE, DOCUMENTS)
        z += seen * tap(weight, d, back, D, K)[None, :]
    if BIAS:
        z += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["l"])
def forward_kernel(
    x, weight, bias, state, seq_idx, out, l, xb, xl,
    D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, blocks of tokens, b)."""
    b = tl.program_id(2).to(tl.int64)
    t, d = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(0) * BD + tl.arange(0, BD)
    z = weighted(x, weight, bias, state, seq_idx, b, t, d, l, xb, xl, D, K, BIAS, STATE, DOCUMENTS)
    mask = (t < l)[:, None] & (d < D)[None, :]
    tl.store(out + (b * l + t)[:, None] * D + d[None, :], (z * tl.sigmoid(z)).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["l", "parts"])
def backward_kernel(
    x, weight, bias, state, seq_idx, dout, dx, dstate, shares, l, parts, xb, xl,
    D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    DOCUMENTS: tl.constexpr, KP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs and of the state, and shares (b, parts, K + 1, D) of those of the taps and the bias.

    Grid (blocks of channels, parts, b). Rows are tokens s from -(K - 1) on: a negative one is a place of the state.
    """
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row = tl.arange(0, KP)  # of the shares: the taps by how far they look back, then the bias
    share = tl.zeros((KP, BD), tl.float32)
    blocks = tl.minimum(PARTS, tl.cdiv(l + K - 1, BT) - part * PARTS)
    for number in range(blocks):
        s = (part * PARTS + number) * BT + tl.arange(0, BT) - (K - 1)
        total = tl.zeros((BT, BD), tl.float32)
        for ahead in tl.static_range(K):
            t = s + ahead  # the token that sees s `ahead` places before it
            z = weighted(x, weight, bias, state, seq_idx, b, t, d, l, xb, xl, D, K, BIAS, STATE, DOCUMENTS)
            gate = tl.sigmoid(z)
            mask = ((t >= 0) & (t < l))[:, None] & (d < D)[None, :]
            grad = tl.load(dout + (b * l + t)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            grad = grad * gate * (1 + z * (1 - gate))
            if ahead == 0:
                for back in tl.static_range(K):
                    seen = reads(x, state, seq_idx, b, t, back, d, l, xb, xl, D, K, STATE, DOCUMENTS)
                    share += tl.where((row == back)[:, None], tl.sum(grad * seen, 0)[None, :], 0.0)
                share += tl.where((row == K)[:, None], tl.sum(grad, 0)[None, :], 0.0)
            if DOCUMENTS:
                mine = tl.load(seq_idx + b * l + tl.minimum(tl.maximum(s, 0), l - 1))
                theirs = tl.load(seq_idx + b * l + tl.minimum(tl.maximum(t, 0), l - 1))
                grad = tl.where((mine == theirs)[:, None], grad, 0.0)
            total += grad * tap(weight, d, ahead, D, K)[None, :]
        mask = ((s >= 0) & (s < l))[:, None] & (d < D)[None, :]
        tl.store(dx + (b * l + s)[:, None] * D + d[None, :], total.to(dx.dtype.element_ty), mask=mask)
        if STATE:
            place = dstate + (b * D + d)[None, :] * K + (K + s)[:, None]
            tl.store(place, total.to(dstate.dtype.element_ty), mask=(s < 0)[:, None] & (d < D)[None, :])
    place = shares + ((b * parts + part) * (K + 1) + row)[:, None] * D + d[None, :]
    tl.store(place, share, mask=(row <= K)[:, None] & (d < D)[None, :])


@triton.jit
def window(x, state, b, d, column, xb, sb, sd, sk, end, K: tl.constexpr):
    """(channels d < end, KP) the next state: the inputs before the token without the oldest, and the token; the state's dtype."""
    inside = (d < end)[:, None]
    earlier = state + b * sb + d[:, None] * sd + (column + 1)[None, :] * sk
    kept = tl.load(earlier, mask=inside & (column + 1 < K)[None, :], other=0.0)
    new = tl.load(x + b * xb + d, mask=d < end, other=0.0).to(kept.dtype)
    return tl.where((column == K - 1)[None, :], new[:, None], kept)


@triton.jit
def window_output(seen, weight, bias, d, column, end, K: tl.constexpr, BIAS: tl.constexpr):
    """(channels) the convolution of a window, and SiLU, in fp32."""
    taps = tl.load(
        weight + d[:, None] * K + column[None, :], mask=(d < end)[:, None] & (column < K)[None, :], other=0.0
    )
    z = tl.sum(seen.to(tl.float32) * taps.to(tl.float32), 1)
    if BIAS:
        z += tl.load(bias + d, mask=d < end, other=0.0).to(tl.float32)
    return z * tl.sigmoid(z)


@triton.jit
def step_kernel(
    x, weight, bias, state, after, out, xb, sb, sd, sk, ab, ad, ak,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, b). `after` may be `state`: nobody else reads these channels, and all is read by then."""
    b = tl.program_id(1).to(tl.int64)
    d, column = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, KP)
    seen = window(x, state, b, d, column, xb, sb, sd, sk, D, K)
    result = window_output(seen, weight, bias, d, column, D, K, BIAS)
    tl.store(out + b * D + d, result.to(out.dtype.element_ty), mask=d < D)
    tl.debug_barrier()
    place = after + b * ab + d[:, None] * ad + column[None, :] * ak
    tl.store(place, seen, mask=(d < D)[:, None] & (column < K)[None, :])
