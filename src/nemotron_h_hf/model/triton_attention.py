"""Attention of one new token per row over the keys and values of a cache, in Triton.

The keys are split among programs, so one row of a long context keeps a whole GPU busy (flash-decoding). The number of
tokens in the cache is read on the device: a CUDA graph of a step stays right while a static cache fills, and nothing is
read behind the last token.

    split_kernel    one program per split, key head and row: a softmax over its keys, for all query heads that share them
    merge_kernel    one program per query head and row: the splits' sums, weighted by what they left out of their softmax

    b batch, h query heads, g key heads, r query heads per key head, d head_dim, s splits, m columns of the mask
"""

import torch
from torch import Tensor

from .triton_launch import on, padded, products, tl, triton

KEYS = 64  # that a program multiplies at a time
PROGRAMS = 528  # splits are made until there are so many: four for each multiprocessor of a Hopper GPU
MOST_SPLITS = 64


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, length: Tensor | int, mask: Tensor | None, scaling: float
) -> Tensor:
    """softmax(query . keys * scaling) values over the first `length` keys.

    Args:
        query: (b, h, 1, d).
        keys, values: (b, g, room, d) with room >= length; the last dimension contiguous.
        length: tokens in the cache, the new one included; a tensor of one integer on the device, or a number.
        mask: (b, m) bool with m >= length, False for keys that a row does not see; None for all.
        scaling: of the products, usually d**-0.5.

    Returns:
        (b, 1, h, d) in query's dtype. Sums are fp32.
    """
    (b, h, _, d), g = query.shape, keys.shape[1]
    r = h // g
    splits = max(1, min(MOST_SPLITS, triton.cdiv(PROGRAMS, b * g), triton.cdiv(keys.shape[2], KEYS)))
    query, out = query.reshape(b, h, d), query.new_empty(b, 1, h, d)
    sums = query.new_empty(b, h, splits, d, dtype=torch.float32)
    totals = query.new_empty(2, b, h, splits, dtype=torch.float32)  # largest score, sum of exp(score - largest)
    on_device = isinstance(length, Tensor)
    masked = mask is not None
    with on(query):
        split_kernel[(splits, g, b)](
            query, keys, values, length, mask, sums, totals[0], totals[1], scaling,
            *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], mask.stride(0) if masked else 0,
            ON_DEVICE=on_device, MASKED=masked, G=g, R=r, D=d, SPLITS=splits, BR=padded(r), BD=padded(d), BK=KEYS,
            **products(query.dtype), num_warps=4, num_stages=3,
        )  # fmt: skip
        merge_kernel[(h, b)](
            sums, totals[0], totals[1], out, H=h, D=d, SPLITS=splits, BS=triton.next_power_of_2(splits), BD=padded(d),
            num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["length"])
def split_kernel(
    query, keys, values, length, mask, sums, largest, total, scaling,
    qb, qh, kb, kg, kl, vb, vg, vl, mb,
    ON_DEVICE: tl.constexpr, MASKED: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (splits, G, b). Writes sums (b, h, splits, D), largest and total (b, h, splits); a split without keys: 0, -inf, 0."""
    split, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member, column, place = tl.arange(0, BR), tl.arange(0, BD), tl.arange(0, BK)
    real, inside = member < R, column < D
    end = tl.load(length).to(tl.int32) if ON_DEVICE else length
    share = tl.cdiv(tl.cdiv(end, SPLITS), BK) * BK
    first = split * share
    last = tl.minimum(first + share, end)
    q = tl.load(
        query + b * qb + (g * R + member)[:, None] * qh + column[None, :],
        mask=real[:, None] & inside[None, :], other=0.0,
    ).to(DOT)  # fmt: skip
    top = tl.full((BR,), float("-inf"), tl.float32)
    weight = tl.zeros((BR,), tl.float32)
    sum = tl.zeros((BR, BD), tl.float32)
    for start in range(first, last, BK):
        t = start + place
        seen = t < last
        row = t.to(tl.int64)[:, None]
        k = tl.load(
            keys + b * kb + g * kg + row * kl + column[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        )
        v = tl.load(
            values + b * vb + g * vg + row * vl + column[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        )
        if MASKED:
            seen = seen & (tl.load(mask + b * mb + t, mask=seen, other=0) != 0)
        score = tl.dot(q, tl.trans(k.to(DOT)), input_precision=PRECISION) * scaling
        score = tl.where(seen[None, :], score, float("-inf"))
        now = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)  # nothing seen yet: exp(-inf - 0) is 0, -inf - -inf is not
        p = tl.exp(score - shift[:, None])
        faded = tl.exp(top - shift)
        sum = sum * faded[:, None] + tl.dot(p.to(DOT), v.to(DOT), input_precision=PRECISION)
        weight, top = weight * faded + tl.sum(p, 1), now
    target = (b * (G * R) + g * R + member) * SPLITS + split
    tl.store(largest + target, top, mask=real)
    tl.store(total + target, weight, mask=real)
    tl.store(sums + target[:, None] * D + column[None, :], sum, mask=real[:, None] & inside[None, :])


@triton.jit
def merge_kernel(
    sums, largest, total, out,
    H: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (H, b). Writes out (b, H, D)."""
    place = tl.program_id(1).to(tl.int64) * H + tl.program_id(0)
    split, column = tl.arange(0, BS), tl.arange(0, BD)
    real, inside = split < SPLITS, column < D
    top = tl.load(largest + place * SPLITS + split, mask=real, other=float("-inf"))
    most = tl.max(top, 0)
    share = tl.exp(top - tl.where(most == float("-inf"), 0.0, most))
    weight = tl.sum(share * tl.load(total + place * SPLITS + split, mask=real, other=0.0), 0)
    parts = tl.load(
        sums + (place * SPLITS + split)[:, None] * D + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
    )
    result = tl.sum(parts * share[:, None], 0) / tl.where(weight == 0, 1.0, weight)  # a row that sees nothing: 0
    tl.store(out + place * D + column, result.to(out.dtype.element_ty), mask=inside)
