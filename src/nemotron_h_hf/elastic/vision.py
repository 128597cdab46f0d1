"""Children of a vision-language parent: its language model's budgets. The tower stays whole; of the projector's last matrix,
whose rows are the language model's hidden channels, the first `hidden_size` rows stay.

    model = NemotronHVLForConditionalGeneration.from_pretrained("parent", budget="half")
    slice_vision("parent", "half", "small")            # the same, as a checkpoint with its processor
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from ..model.configuration_nemotron_h_vl import NemotronHVLConfig
from ..model.modeling_nemotron_h import NemotronHForCausalLM
from ..model.modeling_nemotron_h_vl import NemotronHVLForConditionalGeneration
from ..model.saving import saving
from ..model.weights import find_tensors
from ..output_folders import is_made, note_made, refuse_changed, stamps, writing
from ..slicing import Cut
from ..tokenizer_files import TOKENIZER_FILES, copy_files
from .child import Child
from .child_files import ChildFiles, PendingCut, check_tensors
from .resolve import Request, resolve

TEXT, LAST_OF_PROJECTOR = "language_model.", "mlp1.3.weight"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json")


def find_vision_child(
    config_class: type[NemotronHVLConfig], path: str | os.PathLike | None, budget: Request, arguments: dict[str, Any]
) -> tuple[Child, dict[str, Any]]:
    """The language model's child that a budget asks for, and the arguments of `from_pretrained` that load it with the tower."""
    if path is None:
        raise ValueError(f"budget={budget!r} without a checkpoint: allowed is a folder or hub id of the parent")
    config = arguments.get("config")
    config = copy.deepcopy(config) if isinstance(config, NemotronHVLConfig) else config_class.from_pretrained(path)
    child = resolve(config.text_config, budget)
    config.text_config = child.config
    return child, {**arguments, "config": config}


class VisionChildFiles(ChildFiles):
    """A child's tensors in the files of a vision-language parent, under the names that such files have."""

    def tensors(self, files: Iterable[str | os.PathLike]) -> dict[str, PendingCut]:
        stored = find_tensors(files)
        text = {name.removeprefix(TEXT): it for name, it in stored.items() if name.startswith((TEXT, "mtp."))}
        check_tensors(text, self.child.parent)
        self.parent_bytes = sum(entry.num_bytes for entry in stored.values())
        shapes = {name: it.shape for name, it in stored.items()}
        cuts = cuts_in_files(shapes, self.child.cuts(), self.child.kept.hidden)
        return {cut.name: PendingCut(self, stored[cut.source], cut) for cut in cuts}


def cuts_in_files(shapes: Mapping[str, tuple[int, ...]], cuts: Iterable[Cut], hidden: Tensor) -> Iterator[Cut]:
    """Cuts of a language model under the names that a vision-language checkpoint of these tensors has, and one of each other
    tensor; `hidden` are the language model's channels that stay, in their order."""
    for cut in cuts:
        before = "" if cut.name.startswith("mtp.") else TEXT
        yield cut._replace(name=before + cut.name, source=before + cut.source)
    for name, shape in shapes.items():
        if not name.startswith((TEXT, "mtp.")):
            rows = hidden if name == LAST_OF_PROJECTOR else None
            yield Cut(name, name, shape if rows is None else (len(rows), *shape[1:]), rows, None)


def language_model_of(model: NemotronHVLForConditionalGeneration) -> NemotronHForCausalLM:
    """The language model alone: the very modules, under the text model's names."""
    with torch.device("meta"):
        text = NemotronHForCausalLM(model.config.text_config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    if model.config.text_config.num_nextn_predict_layers:
        text.mtp = model.mtp
    text.generation_config, text.name_or_path = model.generation_config, model.name_or_path
    return text.train(model.training)


def slice_vision(
    parent: str | os.PathLike, budget: Request, output: str | os.PathLike, max_shard_bytes: int | None = None
) -> str:
    """Write a child as a checkpoint with its processor; what was written, in words.

    The child is in memory, the parent never is.

    Args:
        parent: its folder.
        max_shard_bytes: of a file; None for what transformers takes.

    Raises:
        ValueError: for a budget that does not fit, or a folder that has something else in it.
    """
    with writing(output, parent) as target:
        seen = stamps(parent)
        made_from = {"command": "slice", "parent": seen, "budget": str(budget), "max_shard_bytes": max_shard_bytes}
        if is_made(target, made_from):
            return f"{output} is already there and whole: budget {budget!r}"
        model = AutoModelForImageTextToText.from_pretrained(parent, budget=budget)
        with saving(target) as staging:
            model.save_pretrained(staging, **({} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}))
            copy_files([*TOKENIZER_FILES, *PROCESSOR_FILES], Path(parent), staging)
            refuse_changed(seen)
            note_made(staging, made_from)
    count = sum(weight.numel() for weight in model.parameters())
    return f"{output} holds budget {budget!r}: {count:,} parameters, tower and projector included"


def sees(parent: str | os.PathLike) -> bool:
    """Whether a checkpoint is a vision-language model's."""
    return isinstance(AutoConfig.from_pretrained(parent), NemotronHVLConfig)
