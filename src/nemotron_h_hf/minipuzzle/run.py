"""What the stages of one run share: arguments, teacher, text, the memory image, and what each stage is made from."""

from __future__ import annotations

import copy
import gc
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..compression.importance import WidthScores
from ..compression.layer_scores import MEASURES
from ..elastic.cut.cutting import local_folder, read_parent
from ..elastic.prepare.defaults import default_choices
from ..elastic.prepare.elasticize import check_model
from ..elastic.prepare.streaming import streamed
from ..errors import require
from ..inputs import read_device
from ..model.configuration_nemotron_h import NemotronHConfig, NemotronHPuzzleConfig
from ..model.modeling_nemotron_h import NemotronHForCausalLM
from ..output_folders import stamps
from .arguments import REMOVAL, STAGES, MiniPuzzleArguments
from .memory_image import MemoryImage, order_of
from .stage_files import Stage
from .text import Text, file_stamps

WIDTH_SCORES = "widths.safetensors"
DEPENDS_ON = {
    "scores": ("column", "sequence_length", "layer_samples", "width_samples", "neuron_score", "dtype", "seed",
               "ranking_tokens", "mixed_widths"),
    "candidates": ("layer_score", "reduce", "counts", "keep"),
    "ranked": ("controls",),
    "benchmarked": ("top", "tasks", "task_limit", "task_length", "finalists", "min_distance"),
    "tournament": ("short_tokens", "rounds", "distill_controls", "top_k", "distill"),
    "student": ("long_tokens",),
}  # fmt: skip
"""Stage -> the arguments that its result depends on, next to the stage before."""


class Run:
    """One teacher and one work folder, which is locked."""

    def __init__(self, arguments: MiniPuzzleArguments, work: Path) -> None:
        self.arguments, self.work = arguments, work
        self.teacher = local_folder(arguments.teacher)
        kind = PreTrainedConfig.get_config_dict(self.teacher)[0].get("model_type")
        kinds = (NemotronHConfig.model_type, NemotronHPuzzleConfig.model_type)
        require(kind in kinds, "teacher", f"{arguments.teacher} ({kind})", f"a model of {' or '.join(kinds)}")
        self.config = read_parent(self.teacher)
        require(self.config.num_hidden_layers > 1, "teacher", arguments.teacher, "a model of several layers")
        quantised = self.config.to_dict().get("quantization_config")
        require(not quantised, "quantization_config", quantised, "none: a teacher in its own precision")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = read_device(arguments.device or default)
        self._image: MemoryImage | None = None

    @cached_property
    def text(self) -> Text:
        """Tokenizer and documents."""
        return Text(self.arguments, self.teacher, self.work)

    @cached_property
    def sizes(self) -> dict[str, list[int]]:
        """What is tried for each field, the teacher's own size among it."""
        asked = self.arguments.sizes
        if not asked:
            known = default_choices(self.config)
            asked = {name: known[name] for name in ("intermediate_size", "moe_intermediate_size") if name in known}
        own = {name: getattr(self.config, name) for name in asked}
        return {
            name: sorted({*sizes, *([own[name]] if isinstance(own[name], int) else [])})
            for name, sizes in asked.items()
        }

    @property
    def measures(self) -> list[str]:
        """Layer scores that are taken in one go."""
        asked = [name for name in (self.arguments.layer_score, *self.arguments.more_scores) if name in MEASURES]
        return list(dict.fromkeys(asked)) or ["hidden"]

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """All of them, each with what it is made from."""
        arguments, more, found = self.arguments, self._more(), {}
        before: dict[str, Any] = {}
        for name in STAGES:
            own = {field: getattr(arguments, field) for field in DEPENDS_ON[name]}
            found[name] = Stage(self.work, name, {**before, **more.get(name, {}), **own})
            before = {"after": found[name].digest}
        return found

    def image(self, rule: str = "importance") -> MemoryImage:
        """The teacher in memory, in the order of its width scores; one at a time."""
        if self._image is None or self._image.rule != rule:
            self.forget_image()
            model = self.load()
            scores = WidthScores.load(self.work / WIDTH_SCORES, self.width_mark)
            self._image = MemoryImage.of(model, order_of(self.config, scores, set(self.sizes), rule), rule)
        return self._image

    def keep_image(self, image: MemoryImage) -> None:
        """One that a stage made on its way."""
        self._image = image

    def forget_image(self) -> None:
        """Free its memory, where there is one."""
        if self._image is not None:
            self._image = None
            gc.collect()

    def load(self) -> NemotronHForCausalLM:
        """The teacher as it is, whole or a layer at a time.

        Raises:
            ValueError: for one that is quantised, or an elastic parent.
        """
        arguments = self.arguments
        dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        if arguments.stream:
            return streamed(copy.deepcopy(self.config), self.teacher, dtype, self.device)
        model = NemotronHForCausalLM.from_pretrained(self.teacher, dtype=dtype or "auto").to(self.device).eval()
        check_model(model)
        return model

    @property
    def width_mark(self) -> str:
        """A fingerprint of teacher, text and rule, in the file of width scores."""
        return self.stages["scores"].digest

    def _more(self) -> dict[str, dict[str, Any]]:
        """What stages depend on that is no argument as it stands."""
        arguments = self.arguments
        sources = {
            "teacher": stamps(self.teacher), "data": file_stamps(arguments.data), "held_out": file_stamps(arguments.held_out),
            "measures": sorted(self.measures), "removal": arguments.layer_score == REMOVAL,
        }  # fmt: skip
        narrow = {"sizes": self.sizes} if arguments.mixed_widths else {}
        limits = {"limits": arguments.limits(), "deployment": arguments.deployment.describe()}
        return {
            "scores": {**sources, **narrow},
            "candidates": {"sizes": self.sizes, **limits, "latency": file_stamps([arguments.latency or ""])},
        }
