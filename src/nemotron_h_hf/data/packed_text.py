"""Rows of one length out of plain texts, to measure on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .packing import SplitRows


def packed_rows(
    tokenizer: PreTrainedTokenizerBase, end: int, texts: Iterable[str], name: str, num_rows: int, length: int
) -> list[dict[str, Tensor]]:
    """The first rows of concatenated documents, each after an `end` token; reads no more texts than needed.

    Raises:
        ValueError: if there is less text; `name` is the option that asked for the rows.
    """
    documents, num_tokens = [], 0
    with tqdm(total=num_rows * length, unit="token", unit_scale=True, desc=f"text for {name}") as bar:
        for text in texts:
            documents.append([end, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
            num_tokens += len(documents[-1])
            bar.update(len(documents[-1]))
            if num_tokens >= num_rows * length:
                return list(islice(SplitRows(documents, length), num_rows))
    raise ValueError(
        f"{name}: {num_rows} rows of {length} tokens are asked for, the text has {num_tokens:,} tokens; give more text "
        f"or at most {num_tokens // length} rows"
    )
