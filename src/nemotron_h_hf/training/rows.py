"""The rows of a run: what the data flags of any training command name, encoded, blended and packed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.blended_rows import Encode, one_round, packed_blend, sources_and_phases
from ..data.fine_tuning_records import encode_record
from ..data.packing import Rows
from ..data.sources import Source
from ..errors import require
from .arguments import NemotronHTrainingArguments
from .data_arguments import DataArguments, PretrainDataArguments


def make_rows(
    data: DataArguments | PretrainDataArguments,
    training: NemotronHTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode | None = None,
    split_documents: bool = True,
    shuffle_rows: int = 0,
    join: Callable[..., Mapping[str, Any]] | None = None,
) -> tuple[Rows, list | None]:
    """Rows for the whole run, and held-out rows if --eval_data names any.

    Args:
        encode: a record to token ids and labels; fine-tuning records (see data/fine_tuning_records.py) if not given.
        split_documents, shuffle_rows, join: see `packed_blend`.
    """
    sources, phases = sources_and_phases(data.data, data.sources, data.phases, data.column)
    encode = encode or record_encoder(tokenizer)
    length, pad, total = training.sequence_length, pad_token(tokenizer), training.max_steps * training.tokens_per_step
    rows = packed_blend(
        sources, phases, encode, total, length, pad, training.seed_of_data, split_documents, data.on_bad_data, join, shuffle_rows
    )  # fmt: skip
    if not data.eval_data:
        return rows, None
    held_out = Source("eval_data", path=data.eval_data, column=None, shuffle_window=0)
    return rows, list(one_round(held_out, record_encoder(tokenizer), length, pad, split_documents, data.on_bad_data))


def set_steps(data: DataArguments, training: NemotronHTrainingArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make --num_train_epochs of whole records `training.max_steps`, unless that is given; reads the source once."""
    if training.max_steps > 0:
        return
    sources, _ = sources_and_phases(data.data, data.sources, data.phases, data.column)
    require(len(sources) == 1, "max_steps", training.max_steps, "with several sources: --max_steps or --total_tokens")
    length, encode = training.sequence_length, record_encoder(tokenizer)
    num_rows = sum(1 for _ in one_round(sources[0], encode, length, pad_token(tokenizer), on_bad_data=data.on_bad_data))
    training.max_steps = math.ceil(training.num_train_epochs * num_rows * length / training.tokens_per_step)
    print(f"{num_rows:,} rows of {length:,} tokens in an epoch, {training.max_steps:,} steps", file=sys.stderr)


def record_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Record -> token ids and labels."""
    return lambda record: encode_record(record, tokenizer)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a row: the padding token, or the end token where there is none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
