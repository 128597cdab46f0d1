"""Held-out bits per byte of any causal language model, document by document; an interrupted run can resume.

The protocol is that of evaluation/bits_per_byte.py: a document is an end token, its tokens and an end token; all after
the first are scored, in windows that overlap. Bits per byte compare models with different tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemotron_h_hf.evaluation.bits_per_byte import document_bits

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
