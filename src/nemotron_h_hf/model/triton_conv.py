"""`ssd.causal_conv` and `ssd.conv_step` in Triton: each channel's convolution over its own past, then SiLU.

With z_t = bias + sum over back < k of w[back] x_{t - back} and out_t = z_t sigmoid(z_t), the gradient of a token is the
convolution read the other way, dx_s = sum over back of w[back] dz_{s + back}, dz = dout * silu'(z), where z is computed
again from x. Memory bounds all of it, so everything is read once: a program takes some channels and walks over tokens, the
last k - 1 rows of x (and of dz) in registers. It loads STEP rows before it stores one, because the compiler must not move
a load over a store, and a GPU needs many loads on their way. A row of 256 bf16 channels is 16 bytes for each thread of a
warp, as much as one load takes. A backward program computes the k - 1 rows of dz before its own again. Tokens before the
first, s in -(k - 1) .. -1, are the initial state's, and so is their gradient. Sums are fp32 for all inputs.

    b batch, l length, d channels, k taps; w[back] is tap k - 1 - back, `back` tokens before the current one
"""

import torch
from torch import Tensor

from .ssd import causal_conv as plain_conv
from .triton_launch import last_contiguous, on, tl, triton

TAPS = (2, 3, 4)  # which the kernels of a sequence take
CHANNELS, WARPS = 256, 1  # of one program
STEP, GRADIENT_STEP = 8, 4  # rows on their way at a time
PROGRAMS, GRADIENT_PROGRAMS = 4096, 2048  # as many share the tokens, where each then walks over
WALK = 16, 256  # tokens at least and at most
STEP_CHANNELS = 128


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """`ssd.causal_conv`: (b, l, d) in x's dtype, with the taps as they are stored.

    Raises:
        ValueError: for other than 2 to 4 taps.
    """
    if weight.shape[1] not in TAPS:
        raise ValueError(f"conv_kernel={weight.shape[1]}: the Triton kernels take 2 to 4 taps")
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
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx)
        (b, l, d), weight = x.shape, weight.contiguous()
        state = None if initial_state is None else initial_state.contiguous()
        out, tokens = x.new_empty(b, l, d), _walk(b, l, d, PROGRAMS)
        with on(x):
            forward_kernel[(triton.cdiv(d, CHANNELS), triton.cdiv(l, tokens), b)](
                x, weight, bias, state, seq_idx, out, l, tokens, *x.stride()[:2], STEP=STEP,
                **_sizes(weight, bias, state, seq_idx),
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight, bias, state, seq_idx = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated
            inputs, needed = (x, weight, bias, state), ctx.needs_input_grad[:4]
            wanted = [tensor for tensor, asked in zip(inputs, needed) if asked]
            found = iter(torch.autograd.grad(plain_conv(*inputs, seq_idx), wanted, dout, create_graph=True))
            return *(next(found) if asked else None for asked in needed), None
        (b, l, d), taps, weight = x.shape, weight.shape[1], weight.contiguous()
        state = None if state is None else state.contiguous()
        tokens = _walk(b, l + taps - 1, d, GRADIENT_PROGRAMS)
        parts = triton.cdiv(l + taps - 1, tokens)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dstate = None if state is None else torch.zeros_like(state)
        shares = x.new_empty(b, parts, taps + 1, d, dtype=torch.float32)  # of the taps' gradient, and of the bias's
        with on(x):
            backward_kernel[(triton.cdiv(d, CHANNELS), parts, b)](
                x, weight, bias, state, seq_idx, dout.contiguous(), dx, dstate, shares, l, tokens, parts,
                *x.stride()[:2], STEP=GRADIENT_STEP, **_sizes(weight, bias, state, seq_idx),
            )  # fmt: skip
        sums = shares.sum((0, 1))  # (k + 1, d)
        dweight = sums[:taps].t().to(weight.dtype)
        return dx, dweight, None if bias is None else sums[taps].to(bias.dtype), dstate, None


def _walk(b: int, l: int, d: int, programs: int) -> int:
    """How many tokens one program walks over: a multiple of both steps."""
    tokens = b * l * triton.cdiv(d, CHANNELS) // programs
    return min(max(triton.cdiv(tokens, WALK[0]) * WALK[0], WALK[0]), WALK[1])


def _sizes(weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None) -> dict[str, int]:
    d, taps = weight.shape
    given = {"BIAS": bias is not None, "STATE": state is not None, "DOCUMENTS": seq_idx is not None}
    return {"D": d, "K": taps, "BD": CHANNELS, "num_warps": WARPS, **given}


@triton.jit
def row(of, b, t, d, l, D: tl.constexpr, ob, ol):
    """(channels) row t of a tensor (b, l, d) in fp32; zeros outside."""
    place = of + b * ob + t.to(tl.int64) * ol + d
    return tl.load(place, mask=(d < D) & between(t, d, 0, l), other=0.0).to(tl.float32)


@triton.jit
def between(t, d, low, high):
    """Whether low <= t < high, once for each channel."""
    t = t + tl.zeros_like(d)
    return (t >= low) & (t < high)


@triton.jit
def document(seq_idx, b, t, l, DOCUMENTS: tl.constexpr):
    """Of token t; the state belongs to the first token's."""
    if DOCUMENTS:
        return tl.load(seq_idx + b * l + tl.minimum(tl.maximum(t, 0), l - 1))
    else:
        return t


@triton.jit
def rows_before(
    x, state, seq_idx, b, t, d, l, xb, xl, COUNT: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, STATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The COUNT inputs before token t, the oldest first, those before token 0 from the state; and their documents."""
    rows, documents = (), ()
    for back in tl.static_range(COUNT):
        s = t - COUNT + back
        value = row(x, b, s, d, l, D, xb, xl)
        if STATE:
            mask = (d < D) & between(s, d, 1 - K, 0)
            value += tl.load(state + (b * D + d) * K + (K + s), mask=mask, other=0.0).to(tl.float32)
        rows = rows + (value,)
        documents = documents + (document(seq_idx, b, s, l, DOCUMENTS),)
    return rows, documents


@triton.jit
def taps_and_bias(weight, bias, d, D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr):
    """Four taps (channels), that of the oldest token first and zeros after the K-th, and the bias, in fp32."""
    column = tl.arange(0, 4)
    place, mask = weight + d[:, None] * K + column[None, :], (d < D)[:, None] & (column < K)[None, :]
    even, odd = tl.split(tl.load(place, mask=mask, other=0.0).to(tl.float32).reshape(BD, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    offset = tl.zeros((BD,), tl.float32)
    if BIAS:
        offset = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    return (first, second, third, fourth), offset


@triton.jit
def if_same(value, one, other, DOCUMENTS: tl.constexpr):
    """`value`, or zeros where the two documents differ."""
    if DOCUMENTS:
        return tl.where(one == other, value, 0.0)
    else:
        return value


@triton.jit
def weighted(rows, documents, taps, offset, at: tl.constexpr, K: tl.constexpr, DOCUMENTS: tl.constexpr):
    """z (channels), before SiLU, of the token whose window starts at place `at` of the rows."""
    z = offset
    for tap in tl.static_range(K):
        z += if_same(rows[at + tap], documents[at + tap], documents[at + K - 1], DOCUMENTS) * taps[tap]
    return z


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), half the instructions of Triton's: a power of two and an inverse root are one each."""
    root = tl.rsqrt(1 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def through_silu(grad, z):
    """dz of dout."""
    gate = sigmoid(z)
    return grad * gate * (1 + z * (1 - gate))


@triton.jit(do_not_specialize=["l", "tokens"])
def forward_kernel(
    x, weight, bias, state, seq_idx, out, l, tokens, xb, xl,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, parts of `tokens` tokens, b)."""
    b, first = tl.program_id(2).to(tl.int64), tl.program_id(1) * tokens
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    taps, offset = taps_and_bias(weight, bias, d, D, K, BD, BIAS)
    before, documents_before = rows_before(x, state, seq_idx, b, first, d, l, xb, xl, K - 1, D, K, STATE, DOCUMENTS)
    for number in range(tl.cdiv(tl.minimum(tokens, l - first), STEP)):
        start = first + number * STEP
        rows, documents = before, documents_before
        for i in tl.static_range(STEP):
            rows = rows + (row(x, b, start + i, d, l, D, xb, xl),)
            documents = documents + (document(seq_idx, b, start + i, l, DOCUMENTS),)
        for i in tl.static_range(STEP):
            z = weighted(rows, documents, taps, offset, i, K, DOCUMENTS)
            place, mask = out + (b * l + start + i) * D + d, (d < D) & between(start + i, d, 0, l)
            tl.store(place, (z * sigmoid(z)).to(out.dtype.element_ty), mask=mask)
        before, documents_before = rows[STEP:], documents[STEP:]


@triton.jit(do_not_specialize=["l", "tokens", "parts"])
def backward_kernel(
    x, weight, bias, state, seq_idx, dout, dx, dstate, shares, l, tokens, parts, xb, xl,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs and of the state, and shares (b, parts, K + 1, D) of those of the taps and the bias.

    Grid (blocks of channels, parts, b). At token t the gradient of input t - (K - 1) is complete; a negative one is a
    place of the state. Parts cover the K - 1 places after the last token, whose dz is zero, too.
    """
    b, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    d, first, db = tl.program_id(0) * BD + tl.arange(0, BD), part * tokens, l.to(tl.int64) * D
    taps, offset = taps_and_bias(weight, bias, d, D, K, BD, BIAS)
    seen, documents_seen = rows_before(x, state, seq_idx, b, first, d, l, xb, xl, 2 * K - 2, D, K, STATE, DOCUMENTS)
    dz_before, sums = (), (tl.zeros((BD,), tl.float32),)
    for i in tl.static_range(K - 1):
        z = weighted(seen, documents_seen, taps, offset, i, K, DOCUMENTS)
        dz_before = dz_before + (through_silu(row(dout, b, first - (K - 1) + i, d, l, D, db, D), z),)
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros((BD,), tl.float32),)
    before, documents_before = seen[K - 1 :], documents_seen[K - 1 :]
    for number in range(tl.cdiv(tl.minimum(tokens, l + K - 1 - first), STEP)):
        start = first + number * STEP
        rows, documents, grads, dz = before, documents_before, (), dz_before
        for i in tl.static_range(STEP):
            rows = rows + (row(x, b, start + i, d, l, D, xb, xl),)
            grads = grads + (row(dout, b, start + i, d, l, D, db, D),)
            documents = documents + (document(seq_idx, b, start + i, l, DOCUMENTS),)
        for i in tl.static_range(STEP):
            now = through_silu(grads[i], weighted(rows, documents, taps, offset, i, K, DOCUMENTS))
            dz, added = dz + (now,), ()
            total = tl.zeros((BD,), tl.float32)
            for tap in tl.static_range(K):
                met = if_same(rows[i + tap], documents[i + tap], documents[i + K - 1], DOCUMENTS)
                added = added + (sums[tap] + now * met,)
                total += if_same(dz[i + tap], documents[i], documents[i + tap], DOCUMENTS) * taps[K - 1 - tap]
            sums = added + (sums[K] + now,)
            s = start + i - (K - 1)
            place, mask = dx + b * db + s.to(tl.int64) * D + d, (d < D) & between(s, d, 0, l)
            tl.store(place, total.to(dx.dtype.element_ty), mask=mask)
            if STATE:
                place = dstate + (b * D + d) * K + (K + s)
                tl.store(place, total.to(dstate.dtype.element_ty), mask=(d < D) & between(s, d, 1 - K, 0))
        before, documents_before, dz_before = rows[STEP:], documents[STEP:], dz[STEP:]
    for index in tl.static_range(K + 1):
        tl.store(shares + ((b * parts + part) * (K + 1) + index) * D + d, sums[index], mask=d < D)


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
    """Grid (blocks of channels, b). `after` may be `state`: no other program reads these channels, and all is read by then."""
    b = tl.program_id(1).to(tl.int64)
    d, column = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, KP)
    seen = window(x, state, b, d, column, xb, sb, sd, sk, D, K)
    result = window_output(seen, weight, bias, d, column, D, K, BIAS)
    tl.store(out + b * D + d, result.to(out.dtype.element_ty), mask=d < D)
    tl.debug_barrier()
    place = after + b * ab + d[:, None] * ad + column[None, :] * ak
    tl.store(place, seen, mask=(d < D)[:, None] & (column < K)[None, :])
