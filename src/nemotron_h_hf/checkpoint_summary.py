"""The facts of one checkpoint, from its configuration and file headers: what `info` prints and a model card states."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedConfig

from . import cost
from .elastic.budgets import Budget, read_elastic
from .elastic.child import Child, child_of
from .model.configuration_nemotron_h import PUZZLE_LISTS, NemotronHConfig, NemotronHPuzzleConfig
from .model.configuration_nemotron_h_vl import NemotronHNanoVLConfig, NemotronHOmniConfig, NemotronHVLConfig
from .model.json_files import read_json
from .model.weights import DTYPES, Stored, files_of, read_header, read_name
from .tensors import AXES, checkpoint_tensors
from .vision_summary import VisionFacts, describe_vision

CONFIGS = (NemotronHConfig, NemotronHPuzzleConfig, NemotronHVLConfig, NemotronHNanoVLConfig, NemotronHOmniConfig)
LAYER_NAMES = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "MoE"}


@dataclass(frozen=True)
class Facts:
    """Counts are exact; bytes are for weights and KV cache in `dtype`, SSM state in float32."""

    target: str
    pattern: str
    mtp_pattern: str
    hidden_size: int
    vocab_size: int
    parameters: dict[str, int]
    parameters_by_layer: list[int]  # those of multi-token prediction, all depths, last
    expert_layers: list[dict[str, int | None]]  # sizes of each layer with experts, if they differ
    num_parameters: int
    num_active_parameters: int
    num_checkpoint_tensors: int
    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    ssm_state_bytes: int
    conv_state_bytes: int
    vision: VisionFacts | None = None

    @property
    def layer_counts(self) -> dict[str, int]:
        """Layers of each kind by its name, in the order M * - E, kinds that are absent left out."""
        counts = Counter(self.pattern)
        return {name: counts[letter] for letter, name in LAYER_NAMES.items() if counts[letter]}

    def cache_bytes(self, num_tokens: int) -> int:
        """Bytes of one sequence's cache after `num_tokens`."""
        return num_tokens * self.kv_bytes_per_token + self.ssm_state_bytes + self.conv_state_bytes


@dataclass(frozen=True)
class BudgetFacts:
    """One nested model: its sizes (a list where layers differ), its own facts, and its origin."""

    sizes: dict[str, int | list[int]]
    facts: Facts
    trained: bool
    loss: float | None


@dataclass
class Contents:
    """All tensors of a folder, and what is wrong with its files."""

    tensors: dict[str, Stored] = field(default_factory=dict)
    missing_files: list[str] = field(default_factory=list)
    damaged_files: dict[str, str] = field(default_factory=dict)  # file -> what is wrong with it
    missing_tensors: list[str] = field(default_factory=list)  # in the index, in none of the files read

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def elements_by_dtype(self) -> dict[str, int]:
        """Elements of each dtype, the most common first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[str(DTYPES.get(tensor.code, tensor.code)).removeprefix("torch.")] += math.prod(tensor.shape)
        return dict(counts.most_common())


def read_contents(folder: str | os.PathLike) -> Contents:
    """Read the headers of a checkpoint folder, sharded or not; damage is collected, not raised.

    Raises `ValueError` when the folder has no safetensors weights at all, or an index that is not one.
    """
    contents = Contents()
    places = files_of(Path(folder))
    for path in sorted(places):
        if not path.is_file():
            contents.missing_files.append(path.name)
            continue
        try:
            contents.tensors |= read_header(path)
        except ValueError as error:
            contents.damaged_files[path.name] = str(error)
    unread = {*contents.missing_files, *contents.damaged_files}
    wanted = [name for path, names in places.items() if path.name not in unread for name in names]
    contents.missing_tensors = [name for name in wanted if name not in contents.tensors]
    return contents


def load_target(target: str | os.PathLike) -> tuple[NemotronHConfig | NemotronHVLConfig, Contents | None]:
    """Configuration of a checkpoint folder, preset or hub id, and for a folder with weights what its headers say.

    Raises `ValueError` if the target is none of the three or is not a Nemotron-H model.
    """
    target = os.fspath(target)
    if Path(target).is_dir():
        return _load_config(target), read_contents(target)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", target) and not Path(target).parent.is_dir():
        return _load_config(target), None
    try:
        return NemotronHConfig.from_preset(target), None
    except ValueError as error:
        raise ValueError(f"target={target!r} is no folder and no hub id (owner/name); as a preset: {error}") from None


def describe(
    target: str, config: NemotronHConfig | NemotronHVLConfig, contents: Contents | None = None, dtype: str | None = None
) -> Facts:
    """Facts of `config`; of a vision-language model those of its language model, and in `vision` the rest.

    `dtype` defaults to what most stored weights have, then to the configuration's, then bfloat16. The bytes of the weights are
    the stored ones where `contents` has them.
    """
    dtype = dtype or _main_dtype(config, contents)
    vision = describe_vision(config) if isinstance(config, NemotronHVLConfig) else None
    config = config.get_text_config()
    return Facts(
        target=str(target),
        pattern=config.hybrid_override_pattern,
        mtp_pattern=config.mtp_hybrid_override_pattern * config.num_nextn_predict_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        parameters=cost.parameters_by_kind(config),
        parameters_by_layer=cost.parameters_by_layer(config),
        expert_layers=_expert_layers(config),
        num_parameters=cost.num_parameters(config),
        num_active_parameters=cost.num_active_parameters(config),
        num_checkpoint_tensors=cost.num_checkpoint_tensors(config),
        dtype=dtype,
        weight_bytes=contents.num_bytes if contents else cost.weight_bytes(config, dtype),
        kv_bytes_per_token=cost.kv_bytes_per_token(config, dtype),
        ssm_state_bytes=cost.ssm_state_bytes(config),
        conv_state_bytes=cost.conv_state_bytes(config, dtype),
        vision=vision,
    )


def describe_budgets(config: NemotronHConfig, dtype: str) -> list[BudgetFacts]:
    """The parent and each budget that its configuration names, in that order; empty if it names none."""
    config = config.get_text_config()
    if not config.elastic:
        return []
    budgets = [Budget(name="(parent)"), *read_elastic(config).budgets.values()]
    return [_budget_facts(child_of(config, budget), dtype) for budget in budgets]


def disagreements(config: NemotronHConfig, contents: Contents) -> list[str]:
    """One line for each tensor that the configuration asks for and the files lack or hold in another shape.

    Tensors that the configuration does not describe, such as scales of quantised weights, are accepted.
    """
    stored = _by_template(contents)
    lines = []
    for tensor in checkpoint_tensors(config.get_text_config()):
        shapes = stored.get(tensor.name, [])
        if len(shapes) != tensor.copies:
            expected = f"{tensor.copies} of shape {list(tensor.shape)}"
            lines.append(f"{tensor.name}: config.json asks for {expected}, the files hold {len(shapes)}")
        elif set(shapes) != {tensor.shape}:
            found = sorted(list(shape) for shape in set(shapes) - {tensor.shape})[0]
            lines.append(f"{tensor.name}: config.json asks for shape {list(tensor.shape)}, the files hold {found}")
    return lines


def _expert_layers(config: NemotronHConfig) -> list[dict[str, int | None]]:
    """The sizes of each layer of experts, multi-token prediction after the stack; none if all are alike."""
    if not any(isinstance(getattr(config, field), list) for field in PUZZLE_LISTS):
        return []
    return [
        {"layer": layer, **{field: config.size(field, layer) for field in PUZZLE_LISTS}}
        for layer in config.layers_with("moe")
    ]


def _budget_facts(child: Child, dtype: str) -> BudgetFacts:
    config, budget = child.config, child.budget
    kinds = {None, *config.layers_block_type}
    there = [axis.field for axis in AXES if axis.kind in kinds] + ["num_experts_per_tok"] * ("moe" in kinds)
    sizes = {field: getattr(config, field) for field in there}
    return BudgetFacts(sizes, describe(budget.name, config, None, dtype), budget.trained, budget.loss)


def _load_config(name: str) -> NemotronHConfig | NemotronHVLConfig:
    if (path := Path(name) / "config.json").is_file():
        read_json(path)
    fields, _ = PreTrainedConfig.get_config_dict(name)
    known = {config_class.model_type: config_class for config_class in CONFIGS}
    if fields.get("model_type") not in known:
        raise ValueError(
            f"model_type of {name} is {fields.get('model_type')!r}: allowed are {', '.join(map(repr, known))}"
        )
    return known[fields["model_type"]].from_dict(fields)


def _main_dtype(config: NemotronHConfig, contents: Contents | None) -> str:
    stored = list(contents.elements_by_dtype()) if contents else []
    if stored and stored[0] in cost.BYTES_PER_ELEMENT:
        return stored[0]
    return str(config.dtype).removeprefix("torch.") if config.dtype else "bfloat16"


def _by_template(contents: Contents) -> dict[str, list[tuple[int, ...]]]:
    """Stored shapes under released names; experts' numbers become `{e}`, stacked experts are taken apart."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for tensor in contents.tensors.values():
        plain = tensor._replace(name=tensor.name.removeprefix("language_model."))
        for name, one in plain.experts().items():
            shapes.setdefault(read_name(name).template, []).append(one.shape)
    return shapes
