"""The flags that say what a model reads, in pretraining and in fine-tuning or distillation, and its chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from ..errors import require
from .arguments import as_mapping, flag


@dataclass
class DataArguments:
    """Where records come from; shared by sft, distill and elastic-train."""

    _argument_group_name = "data"
    column: ClassVar[None] = None  # of a source that names none: the whole record

    data: list[str] | None = flag(
        None, "files, folders or patterns: JSON lines with messages, prompt and completion, or text; or text files"
    )
    sources: dict | str | None = flag(None, "instead of data: a blend's name -> {path: FILES} or {dataset: HUB_ID}")
    phases: dict | str | None = flag(None, "weights of the sources: list of {until: 60%%, weights: {name: 0.7, ...}}")
    eval_data: list[str] | None = flag(
        None,
        "held-out files; their loss is told at the end (by sft and distill before training too), and every --eval_steps N",
    )
    chat_template: str | None = flag(None, "file with a Jinja chat template, for a tokenizer that has none or another")
    on_bad_data: str = flag("skip", "skip, with a count and a warning, or stop", choices=("skip", "error"))

    def __post_init__(self) -> None:
        self.sources, self.phases = as_mapping(self.sources, "sources"), as_mapping(self.phases, "phases")
        require(bool(self.data) != bool(self.sources), "data", self.data, "files, or else --sources")
        template = self.chat_template
        require(template is None or Path(template).is_file(), "chat_template", template, "a file")


@dataclass
class RowArguments:
    """How rows that documents are split into are dealt out; shared by pretrain, distill and elastic-train."""

    _argument_group_name = "data"

    shuffle_rows: int = flag(
        0,
        "rows that are made at once and dealt out in random order, because a long document would fill whole batches; "
        "phases change up to so many rows late or early. As many as the data has: rows out of all documents, however short the "
        "run is. 0: in the order of the documents",
    )

    def __post_init__(self) -> None:
        require(self.shuffle_rows >= 0, "shuffle_rows", self.shuffle_rows, "0 or more")


@dataclass
class PretrainDataArguments(RowArguments):
    """What pretrain reads."""

    _argument_group_name = "data"
    column: ClassVar[str] = "text"
    data: ClassVar[None] = None
    eval_data: ClassVar[None] = None

    sources: dict | str | None = flag(None, "name -> {path: FILES} or {dataset: HUB_ID, split: train}; needed")
    phases: dict | str | None = flag(
        None, "list of {until: 60%%, weights: {name: 0.7, ...}}; default: one phase, sources weighted alike"
    )
    on_bad_data: str = flag("skip", "skip, with a count and a warning, or stop", choices=("skip", "error"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources, self.phases = as_mapping(self.sources, "sources"), as_mapping(self.phases, "phases")


@dataclass
class LongContextArguments:
    """How conversations fill a row."""

    _argument_group_name = "long context"

    long_context: bool = flag(
        False, "join conversations up to sequence_length, with synthetic turns that ask for something said far back"
    )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Give the tokenizer the template in a file, if one is named."""
    if path is not None:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
