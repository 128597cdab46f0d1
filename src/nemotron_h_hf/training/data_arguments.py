"""The flags that say what a model is fine-tuned or distilled on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import as_mapping, require


def _flag(default: Any, help_text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **more})


@dataclass
class DataArguments:
    """Where records come from; shared by sft and distill."""

    _argument_group_name = "data"

    data: list[str] | None = _flag(
        None, "files, folders or patterns: JSON lines with messages, prompt and completion, or text; or text files"
    )
    sources: dict | str | None = _flag(None, "instead of data: a blend's name -> {path: FILES} or {dataset: HUB_ID}")
    phases: dict | str | None = _flag(None, "weights of the sources: list of {until: 60%%, weights: {name: 0.7, ...}}")
    eval_data: list[str] | None = _flag(
        None, "held-out files; their loss is told before and after, and every --eval_steps"
    )
    chat_template: str | None = _flag(None, "file with a Jinja chat template, for a tokenizer that has none or another")
    on_bad_data: str = _flag("skip", "skip, with a count and a warning, or stop", choices=("skip", "error"))

    def __post_init__(self) -> None:
        self.sources, self.phases = as_mapping(self.sources, "sources"), as_mapping(self.phases, "phases")
        require(bool(self.data) != bool(self.sources), "data", self.data, "files, or else --sources")
        template = self.chat_template
        require(template is None or Path(template).is_file(), "chat_template", template, "a file")
