"""Turning a model into a parent: importance, a permutation that makes every budget a prefix, losses, budgets in the config.

    elasticize(model, rows, held_out)                                   # default budgets: 3/4 and 1/2 of the parameters
    elasticize(model, rows, held_out, budgets={"6b": {"hidden_size": 3072, "mamba_num_heads": 96, "depth": 46}})

The function of the model does not change. Measurements are kept in the folder `work`: width scores every few batches, depth
after every removal, losses one by one. After an interruption the same call, on the model loaded again, does not repeat them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...compression.depth import Removal, layer_order
from ...compression.importance import Importance, importance_of, importance_order
from ...model.configuration_nemotron_h import NemotronHConfig
from ...model.modeling_nemotron_h import NemotronHForCausalLM
from ...slicing import Kept
from ..budgets import CHOICE_FIELDS, Budget, Elastic, check_budget
from ..child import Child, child_of
from ..live.ordered_linear import OrderedLinear
from .defaults import default_budgets, default_choices, default_depths
from .measuring import Row, fingerprint, key_of, measure_depth, measure_losses, measure_width
from .permuting import permute_model


@dataclass(frozen=True)
class Parent:
    """The result: scores, the order that its weights are in now, the removals, and `config.elastic`."""

    importance: Importance
    order: Kept
    removals: list[Removal]
    elastic: Elastic


def elasticize(
    model: NemotronHForCausalLM,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    choices: Mapping[str, Sequence[int]] | None = None,
    depth_rows: Sequence[Row] | None = None,
    num_removals: int | None = None,
    batch_size: int = 8,
    work: str | os.PathLike | None = None,
    reordered: Callable[[Kept], NemotronHForCausalLM] | None = None,
) -> Parent:
    """Permute `model` in place and write budgets, choices, layer order and calibration losses to its configuration.

    Args:
        rows: text for the width scores, every row equally long.
        held_out: other text, for the losses.
        budgets: name -> sizes as in `config.elastic`; `depth` says how many layers stay, the least important ones go.
            Default: 3/4 and 1/2 of the parameters.
        choices: field -> sizes that may be combined, measured one by one. Default: eighths of each width.
        depth_rows: text for the depth scores; default the first eight of `rows`. With none, depth is not scored.
        num_removals: layers that are removed one after another, as `depth.num_passes` counts; default half of them.
        work: folder for what was measured; by default nothing is kept.
        reordered: makes the model with its weights in the given order; default: `model` itself, permuted. With it `model`
            need not be whole in memory (streaming.py).

    Raises:
        ValueError: for a model that is quantised, not whole in memory, or a parent already; for budgets or choices that do
            not fit; for text that is too short.
    """
    config, work = model.config, None if work is None else Path(work)
    depth_rows = rows[:8] if depth_rows is None else depth_rows
    num_removals = config.num_hidden_layers // 2 if num_removals is None else num_removals
    num_removals = num_removals if len(depth_rows) else 0
    named = {name: dict(sizes) for name, sizes in (budgets or {}).items()}
    check_model(model, whole=reordered is None)
    check_text(rows, held_out)
    choices = read_choices(config, default_choices(config) if choices is None else choices)
    check_named(config, named, num_removals)
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    texts = {"width.safetensors": rows, "depth.json": depth_rows, "losses.json": [*rows, *held_out]}
    records = {name: (work and work / name, fingerprint(model, text)) for name, text in texts.items()}
    model.eval()

    importance = importance_of(config, measure_width(model, rows, batch_size, *records["width.safetensors"]))
    removals = measure_depth(model, depth_rows, num_removals, batch_size, *records["depth.json"])
    least_first = layer_order(removals) if removals else []
    order = importance_order(config, importance)
    if reordered is None:
        permute_model(model, order)
    else:
        model = reordered(order)

    found = [named_child(config, name, sizes, least_first) for name, sizes in named.items()]
    found = found or [child_of(config, budget) for budget in default_budgets(config)]
    depths = default_depths(config, config.num_hidden_layers - num_removals) if removals else []
    changes = single_changes(config, choices, depths, least_first)
    losses = measure_losses(model, held_out, [*found, *changes], batch_size, *records["losses.json"])
    measured = {child.name: replace(child.budget, loss=losses[key_of(child.budget)]) for child in found}
    sizes = {field: tuple(found) for field, found in choices.items()}
    elastic = Elastic(measured, sizes, tuple(least_first), calibration_of(changes, losses))
    model.config.elastic = elastic.to_dict()
    model.config.validate()
    return Parent(importance, order, removals, elastic)


def calibration_of(changes: Sequence[Child], losses: Mapping[str, float]) -> dict[str, Any]:
    """The losses of the whole model and of single changes, as in `config.elastic`."""
    calibration: dict[str, Any] = {"loss": losses[key_of(Budget(name="whole"))]}
    for child in changes:
        field, size = child.name.split("=")
        calibration.setdefault(field, {})[size] = losses[key_of(child.budget)]
    return calibration


def check_model(model: NemotronHForCausalLM, whole: bool = True) -> None:
    """Raise a ValueError unless the weights can be scored and reordered; `whole` where that is done in memory."""
    if not isinstance(model, NemotronHForCausalLM):
        raise ValueError(f"model={type(model).__name__}: allowed is NemotronHForCausalLM; merge adapters first")
    if any(isinstance(module, OrderedLinear) for module in model.modules()):
        raise ValueError(
            f"model={type(model).__name__} keeps its weights in the order of budgets: allowed is the ordinary model, "
            "loaded by AutoModelForCausalLM"
        )
    if "quantization_config" in model.config.to_dict():
        raise ValueError("quantization_config: allowed is a model in its own precision; quantise what is cut out of it")
    if model.config.elastic:
        names = ", ".join(model.config.elastic.get("budgets", {})) or "none"
        raise ValueError(
            f"elastic is in the configuration (budgets: {names}): this is a parent already, and another order of its "
            "weights would spoil its budgets: allowed is a model without"
        )
    if whole and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "some weights are offloaded: allowed is a model that is whole in memory; nemotron-h elasticize --stream reads "
            "one layer at a time"
        )


def check_text(rows: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Raise a ValueError unless there is text of both kinds, in rows of one length."""
    for name, text in (("rows", rows), ("held_out", held_out)):
        if len(text) == 0:
            raise ValueError(f"{name}=[]: allowed is one row or more")
        if len({row["input_ids"].shape[-1] for row in text}) > 1:
            raise ValueError(f"{name}=rows of several lengths: allowed is one length")


def check_named(config: NemotronHConfig, named: Mapping[str, Mapping[str, Any]], num_removals: int) -> None:
    """Raise a ValueError for budgets that could not be made, before anything is measured."""
    if not 0 <= num_removals < config.num_hidden_layers:
        raise ValueError(f"num_removals={num_removals}: allowed is 0 to {config.num_hidden_layers - 1}")
    for name, sizes in named.items():
        if "depth" in sizes and not num_removals:
            raise ValueError(f"depth={sizes['depth']} of budget {name!r}: the layers are not scored (depth_rows)")
        named_child(config, name, sizes, range(config.num_hidden_layers))


def named_child(config: NemotronHConfig, name: str, sizes: Mapping[str, Any], least_first: Sequence[int]) -> Child:
    """A child from the sizes of a budget; `depth` layers stay, the least important ones go."""
    entry = dict(sizes)
    if "depth" in entry:
        depth, count = entry.pop("depth"), config.num_hidden_layers
        if "layers" in entry:
            raise ValueError(f"depth={depth} of budget {name!r}: allowed is depth or layers, not both")
        if not isinstance(depth, int) or not 0 < depth <= count:
            raise ValueError(f"depth={depth!r} of budget {name!r}: allowed is 1 to {count}")
        if depth < count:
            entry["layers"] = sorted(least_first[count - depth :])
    return child_of(config, Budget.from_dict(name, entry))


def read_choices(config: NemotronHConfig, choices: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Choices with the parent's own size among them, the largest first.

    Raises:
        ValueError: for an unknown field, or sizes that do not fit.
    """
    found = {}
    for field, sizes in choices.items():
        if field not in CHOICE_FIELDS:
            raise ValueError(f"choices={field!r}: allowed are {', '.join(CHOICE_FIELDS)}")
        whole = getattr(config, field)
        found[field] = sorted({*sizes, *([whole] if isinstance(whole, int) else [])}, reverse=True)
        for size in found[field]:
            check_budget(config, Budget(name=f"choices.{field}", **{field: size}))
    return found


def single_changes(
    config: NemotronHConfig, choices: Mapping[str, Sequence[int]], depths: Sequence[int], least_first: Sequence[int]
) -> list[Child]:
    """The parent with one thing changed: a child named "field=size" for every choice but the parent's own."""
    changes = [
        child_of(config, Budget(name=f"{field}={size}", **{field: size}))
        for field, sizes in choices.items()
        for size in sizes
        if size != getattr(config, field)
    ]
    return changes + [named_child(config, f"layers={depth}", {"depth": depth}, least_first) for depth in depths]
