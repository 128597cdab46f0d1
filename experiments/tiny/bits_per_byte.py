"""Bits per byte of a model that is in memory, by the protocol of `nemotron-h eval`, next to what `xz -9` does with the same bytes."""

import lzma
from collections.abc import Iterable

import torch
from torch import nn

from nemotron_h_hf.evaluation.held_out import document_bits


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


def xz_bits_per_byte(texts: list[str]) -> dict[str, float]:
    """`xz -9` on the same texts: as one joined stream (the stronger figure) and file by file."""
    blobs = [text.encode() for text in texts]
    num_bytes = sum(map(len, blobs))
    joined = len(lzma.compress(b"".join(blobs), preset=9))
    apart = sum(len(lzma.compress(blob, preset=9)) for blob in blobs)
    return {"joined": 8 * joined / num_bytes, "per_file": 8 * apart / num_bytes}
