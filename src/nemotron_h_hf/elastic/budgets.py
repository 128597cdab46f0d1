"""Budgets: the smaller models nested in a parent, as its configuration names them, and the plain configuration of each.

`config.elastic` is JSON. Readers that do not know it load the parent:

    {"version": 1,
     "budgets": {"12b": {"trained": true, "loss": 1.71},                     nothing named: the parent itself
                 "6b": {"hidden_size": 3072, "mamba_num_heads": 96, "intermediate_size": [9216, 12288, ...],
                        "layers": [0, 1, 2, 4, ...], "trained": true, "loss": 1.93}},
     "choices": {"hidden_size": [5120, 4096, 3072], ...},                    sizes that may be combined, largest first
     "layer_order": [17, 4, ...],                                            layers, the least important first
     "calibration": {"loss": 1.71, "hidden_size": {"4096": 1.80, ...}, "layers": {"50": 1.75, ...}}}

A budget's sizes are those of the small model: one number for all kept layers of a kind, or a list with one for each of
them. What it does not name is as in the parent. In the parent's weights every budget is a prefix: of the hidden channels,
of each layer's neurons and experts, of the heads inside each Mamba group (and of their channels), of the key/value heads and of
the query heads of each. Where `num_key_value_heads` is named and `num_attention_heads` is not, each key/value head that
stays keeps all of its query heads; in `choices`, `num_attention_heads` counts as if all key/value heads stayed.
`calibration` holds losses on held-out text with one thing changed: a size, or how many layers stay.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..model.configuration_checks import is_count
from ..tensors import AXES, axes_of, num_groups

logger = logging.get_logger(__name__)

VERSION = 1
FIELDS_OF_KIND = {one.kind: tuple(axis.field for axis in axes_of(one.kind)) for one in AXES if one.kind}
"""Kind of layer -> the sizes that it has in addition to hidden_size."""
CHOICE_FIELDS = tuple(axis.field for axis in AXES)
"""What may be chosen: everything that changes the number of parameters."""
EXPERT_FIELDS = (*FIELDS_OF_KIND["moe"], "num_experts_per_tok")
SIZE_FIELDS = (*CHOICE_FIELDS, "num_experts_per_tok")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One nested model. Sizes are None where they are the parent's; a tuple has one entry for each kept layer of the kind.

    `layers` are the parent's layers that stay, ascending. `loss` is the mean loss per token (nats) on calibration text,
    `trained` says whether the parent was trained with this budget.
    """

    name: str
    hidden_size: int | None = None
    layers: tuple[int, ...] | None = None
    intermediate_size: int | tuple[int, ...] | None = None
    mamba_num_heads: int | tuple[int, ...] | None = None
    mamba_head_dim: int | tuple[int, ...] | None = None
    num_key_value_heads: int | None = None
    num_attention_heads: int | tuple[int, ...] | None = None
    n_routed_experts: int | tuple[int, ...] | None = None
    moe_intermediate_size: int | tuple[int, ...] | None = None
    moe_shared_expert_intermediate_size: int | tuple[int, ...] | None = None
    num_experts_per_tok: int | tuple[int, ...] | None = None
    trained: bool = False
    loss: float | None = None

    @classmethod
    def from_dict(cls, name: str, entry: Any) -> "Budget":
        """A budget from its entry in the configuration."""
        if not isinstance(entry, Mapping):
            raise ValueError(f"budget {name!r} is {entry!r}: allowed is an object of sizes")
        known = {field.name for field in fields(cls)} - {"name"}
        if unknown := set(entry) - known:
            raise ValueError(f"budget {name!r} has {min(unknown)!r}: allowed are {', '.join(sorted(known))}")
        return cls(name=name, **{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()})

    def kept_layers(self, parent: PreTrainedConfig) -> tuple[int, ...]:
        """The parent's layers that stay."""
        return tuple(range(parent.num_hidden_layers)) if self.layers is None else self.layers

    def sizes(self) -> dict[str, Any]:
        """What differs from the parent, for JSON."""
        return {key: value for key, value in self.to_dict().items() if key not in ("trained", "loss")}

    def describe(self) -> str:
        """The sizes as JSON, for people."""
        return json.dumps(self.sizes()) if self.sizes() else "the parent itself"

    def to_dict(self) -> dict[str, Any]:
        """The entry in the configuration: what is set, without the name."""
        entry = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items() if v is not None}
        del entry["name"]
        return entry


@dataclass(frozen=True)
class Elastic:
    """What `config.elastic` says."""

    budgets: dict[str, Budget]
    choices: dict[str, tuple[int, ...]]
    layer_order: tuple[int, ...]
    calibration: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As in the configuration."""
        return {
            "version": VERSION,
            "budgets": {name: budget.to_dict() for name, budget in self.budgets.items()},
            "choices": {field: list(sizes) for field, sizes in self.choices.items()},
            "layer_order": list(self.layer_order),
            "calibration": self.calibration,
        }


def read_elastic(config: PreTrainedConfig) -> Elastic:
    """The budgets of a parent. That they fit it was checked when the configuration was made (`check_elastic`).

    Raises:
        ValueError: if it names none, or something that is no budget: which, the value, and what is allowed.
    """
    entry = config.elastic
    if not entry:
        raise ValueError("elastic is not in the configuration: this model names no budgets (nemotron-h elasticize)")
    if not isinstance(entry, Mapping) or entry.get("version") != VERSION:
        version = entry.get("version") if isinstance(entry, Mapping) else entry
        raise ValueError(f"elastic.version={version!r}: allowed is {VERSION}")
    if unknown := set(entry) - {"version", "budgets", "choices", "layer_order", "calibration"}:
        raise ValueError(f"elastic.{min(unknown)}: allowed are budgets, choices, layer_order, calibration")
    for name in ("budgets", "choices", "calibration"):
        if not isinstance(entry.get(name, {}), Mapping):
            raise ValueError(f"elastic.{name}={entry[name]!r}: allowed is an object")
    budgets = {name: Budget.from_dict(name, sizes) for name, sizes in entry.get("budgets", {}).items()}
    for field, sizes in entry.get("choices", {}).items():
        _check_choices(field, sizes)
    choices = {field: tuple(sizes) for field, sizes in entry.get("choices", {}).items()}
    order = entry.get("layer_order", ())
    every = range(config.num_hidden_layers)
    if not isinstance(order, (list, tuple)) or (
        order and (len(order) != len(every) or not all(i in order for i in every))
    ):
        raise ValueError(f"elastic.layer_order={order!r}: allowed is a list of each of the parent's layers once")
    calibration = dict(entry.get("calibration", {}))
    _check_calibration(calibration)
    return Elastic(budgets, choices, tuple(order), calibration)


def mark_untrained(config: PreTrainedConfig) -> None:
    """Where a parent's weights change as a whole: its smaller budgets lose their losses, and no longer count as trained."""
    if not config.elastic:
        return
    elastic = read_elastic(config)
    budgets = {name: replace(budget, trained=False, loss=None) for name, budget in elastic.budgets.items()}
    config.elastic = replace(elastic, budgets=budgets).to_dict()
    names = ", ".join(name for name, budget in elastic.budgets.items() if budget.trained and budget.sizes())
    if names:
        logger.warning(f"budgets {names} are kept as not trained: this run trains the whole model alone")


def check_elastic(config: PreTrainedConfig) -> None:
    """Raise a ValueError unless every budget and every choice that the configuration names fits it."""
    elastic = read_elastic(config)
    choices = (Budget(name=f"choices.{field}", **{field: size}) for field, of in elastic.choices.items() for size in of)
    for budget in (*elastic.budgets.values(), *choices):
        check_budget(config, budget)


def sizes_of_kept(parent: PreTrainedConfig, budget: Budget, field: str) -> tuple[int, ...]:
    """`field`, a per-layer one, for each kept layer of its kind, in order."""
    kind = parent.PER_LAYER_FIELDS[field]
    kept = [index for index in budget.kept_layers(parent) if parent.layers_block_type[index] == kind]
    value = getattr(budget, field)
    if value is None:
        sizes = tuple(parent.size(field, index) for index in kept)
        return heads_left(parent, sizes, budget.num_key_value_heads) if field == "num_attention_heads" else sizes
    return (value,) * len(kept) if isinstance(value, int) else value


def heads_left(parent: PreTrainedConfig, num_attention_heads: Any, num_key_value_heads: int | None) -> Any:
    """Query heads (a number, or several) that so many key/value heads have, if all of the parent's have the ones given."""
    if num_key_value_heads is None or num_attention_heads is None:
        return num_attention_heads
    if isinstance(num_attention_heads, (list, tuple)):
        return type(num_attention_heads)(
            heads_left(parent, number, num_key_value_heads) for number in num_attention_heads
        )
    return num_attention_heads * num_key_value_heads // parent.num_key_value_heads


def check_budget(parent: PreTrainedConfig, budget: Budget) -> None:
    """Raise a ValueError unless `budget` fits inside `parent`."""

    def require(condition: bool, field: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{field}={getattr(budget, field)!r} of budget {budget.name!r}: allowed is {allowed}")

    require(isinstance(budget.trained, bool), "trained", "true or false")
    require(budget.loss is None or _is_loss(budget.loss), "loss", "a number")
    count = parent.num_hidden_layers
    if budget.layers is not None:
        require(isinstance(budget.layers, tuple), "layers", f"a list of some of the layers 0 to {count - 1}, ascending")
        inside = all(is_count(index + 1) and index < count for index in budget.layers)
        ascending = inside and list(budget.layers) == sorted(set(budget.layers))
        require(ascending and budget.layers, "layers", f"some of the layers 0 to {count - 1}, ascending")
    for field in SIZE_FIELDS:
        value = getattr(budget, field)
        if value is None:
            continue
        require(field not in EXPERT_FIELDS or parent.has_experts, field, "none, as the parent has no experts")
        require(isinstance(value, int) or field in parent.PER_LAYER_FIELDS, field, "a positive integer")
        sizes = value if isinstance(value, tuple) else (value,)
        largest = [getattr(parent, field)]
        if field in parent.PER_LAYER_FIELDS:
            whole = sizes_of_kept(parent, replace(budget, **{field: None}), field)
            require(
                isinstance(value, int) or len(value) == len(whole),
                field,
                f"one size, or one for each of {len(whole)} layers",
            )
            sizes, largest = sizes if len(sizes) > 1 else sizes * len(whole), whole
        require(
            all(map(is_count, sizes)),
            field,
            "a positive integer" + " or a list of them" * (field in parent.PER_LAYER_FIELDS),
        )
        fits = all(size <= most for size, most in zip(sizes, largest))
        require(fits, field, f"at most the parent's {', '.join(map(str, sorted(set(largest))))}")
        multiple = num_groups(parent, field)
        if field == "num_attention_heads" and budget.num_key_value_heads is not None:
            multiple = budget.num_key_value_heads
        require(all(size % multiple == 0 for size in sizes), field, f"a multiple of {multiple}")
        if field == "n_routed_experts":
            asked = budget.num_experts_per_tok
            known = asked is None or is_count(asked) or (isinstance(asked, tuple) and len(asked) == len(sizes))
            least = sizes_of_kept(
                parent, budget if known else replace(budget, num_experts_per_tok=None), "num_experts_per_tok"
            )
            for size, few in zip(sizes, least):
                require(not is_count(few) or size >= few, field, f"at least num_experts_per_tok={few}")
            enough = parent.n_group == 1 or all(size >= 2 * parent.n_group for size in sizes)
            require(enough, field, "two experts or more in each group")


def _check_choices(field: str, sizes: Any) -> None:
    if field not in CHOICE_FIELDS:
        raise ValueError(f"elastic.choices.{field}: allowed are {', '.join(CHOICE_FIELDS)}")
    counts = isinstance(sizes, Sequence) and len(sizes) > 0 and all(map(is_count, sizes))
    if not counts or list(sizes) != sorted(set(sizes), reverse=True):
        raise ValueError(f"elastic.choices.{field}={sizes!r}: allowed are positive integers, the largest first")


def _check_calibration(calibration: Mapping[str, Any]) -> None:
    """Raise a ValueError unless it is a loss, and losses by size for each field."""
    for field, value in calibration.items():
        if field == "loss":
            if not _is_loss(value):
                raise ValueError(f"elastic.calibration.loss={value!r}: allowed is a number")
            continue
        if field != "layers" and field not in SIZE_FIELDS:
            raise ValueError(f"elastic.calibration.{field}: allowed are loss, layers, {', '.join(SIZE_FIELDS)}")
        by_size = isinstance(value, Mapping) and all(str(size).isdecimal() for size in value)
        if not by_size or not all(map(_is_loss, value.values())):
            raise ValueError(f"elastic.calibration.{field}={value!r}: allowed is an object of losses by size")


def _is_loss(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
