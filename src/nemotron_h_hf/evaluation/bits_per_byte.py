"""How well a language model compresses text, in bits per byte, next to what `xz -9` does with the same bytes.

Protocol: a document is `<|endoftext|>` + its tokens + `<|endoftext|>`. The first one is given, everything after it is
scored, so each byte is counted once and the cost of ending the document is included. A window of `window` tokens moves
by `stride`; of each window only tokens that no earlier window scored count, so past the first window a token sees
between `window - stride` and `window - 1` tokens of context. Documents are scored apart; bits and bytes are summed.
"""

import lzma
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def bits_per_byte(
    model: nn.Module, documents: Iterable[tuple[list[int], int]], end_id: int, window: int, stride: int
) -> float:
    """Bits per byte of `model` over `documents`: pairs of token ids (no special ones) and the text's size in bytes."""
    if not 0 < stride < window:
        raise ValueError(f"stride={stride}: allowed is 1 to window - 1 = {window - 1}")
    bits, num_bytes = 0.0, 0
    for token_ids, size in documents:
        bits += document_bits(model, torch.tensor([end_id, *token_ids, end_id]), window, stride)
        num_bytes += size
    return bits / num_bytes


@torch.no_grad()
def document_bits(model: nn.Module, token_ids: Tensor, window: int, stride: int) -> float:
    """Bits to code `token_ids[1:]` (l,) given `token_ids[0]`, in the windows of the protocol above."""
    device = next(model.parameters()).device
    nats = 0.0
    for start, first_scored, end in windows(len(token_ids), window, stride):
        piece = token_ids[start:end].to(device)
        logits = model(input_ids=piece[None], use_cache=False).logits[0, first_scored - start - 1 : -1]  # (scored, v)
        losses = nn.functional.cross_entropy(logits.float(), piece[first_scored - start :], reduction="none")
        nats += losses.double().sum().item()
    return nats / math.log(2)


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end) of each window; the scored ranges cover 1 .. num_tokens - 1 exactly once."""
    first_scored, start = 1, 0
    while first_scored < num_tokens:
        end = min(start + window, num_tokens)
        yield start, first_scored, end
        first_scored, start = end, start + stride


def xz_bits_per_byte(texts: list[str]) -> dict[str, float]:
    """`xz -9` on the same texts: as one joined stream (the stronger figure) and file by file."""
    blobs = [text.encode() for text in texts]
    num_bytes = sum(map(len, blobs))
    joined = len(lzma.compress(b"".join(blobs), preset=9))
    apart = sum(len(lzma.compress(blob, preset=9)) for blob in blobs)
    return {"joined": 8 * joined / num_bytes, "per_file": 8 * apart / num_bytes}
