"""Held-out bits per byte of any causal language model, document by document; an interrupted run can resume.

Protocol: a document is an end token, its tokens and an end token. The first one is given, everything after it is scored, so
each byte is counted once and the cost of ending the document is included. A window of `window` tokens moves by `stride`; of
each window only tokens that no earlier window scored count, so past the first window a token sees between
`window - stride` and `window - 1` tokens of context. Documents are scored apart; bits and bytes are summed. Bits per byte
compare models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .sample_records import Records


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents: the end of sequence, or its beginning where there is no end."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return token
    raise ValueError("tokenizer: it has neither eos_token nor bos_token; bits per byte need a token between documents")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[tuple[str, str]],
    window: int,
    stride: int,
    records: Records,
) -> dict:
    """Score (name, text) pairs that have no record yet; returns the summary of them all.

    A record is known by the document's number, which makes a path spelled in another way the same document.
    """
    if not 0 < stride < window:
        raise ValueError(f"stride={stride}: allowed is 1 to window - 1 = {window - 1}")
    end_id, found = end_token(tokenizer), []
    with tqdm(documents, unit="document", desc="bits per byte") as bar:
        for number, (name, text) in enumerate(bar):
            key = f"bpb/{number}"
            if key not in records:
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                bits = document_bits(model, torch.tensor([end_id, *ids, end_id]), window, stride)
                row = {"task": "bpb", "document": name, "bits": bits, "bytes": len(text.encode()), "tokens": len(ids)}
                records.add(key, row)
            found.append(records[key])
            bar.set_postfix_str(f"{summarise(found)['bits_per_byte']:.4f}")
    return summarise(found)


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


def summarise(found: Sequence[dict]) -> dict:
    """Bits and bytes are summed over documents before they are divided."""
    num_bytes = sum(row["bytes"] for row in found)
    if num_bytes == 0:
        raise ValueError("text: the documents are empty; bits per byte need at least one byte")
    bits = sum(row["bits"] for row in found)
    return {
        "bits_per_byte": bits / num_bytes, "num_documents": len(found), "num_bytes": num_bytes,
        "num_tokens": sum(row["tokens"] for row in found),
    }  # fmt: skip
