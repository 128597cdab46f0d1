"""The children of a parent that fit a fraction of its parameters, or so many bytes, the best first.

The search covers the named budgets and all combinations of `elastic.choices`, without the least important layers of
`elastic.layer_order`. Fitting candidates are ranked by loss: the measured one of a named budget, otherwise a prediction,
the parent's loss plus the cost of each single change on the calibration text. That sum ignores interactions, and a
combination that was never trained can be far worse; every candidate says whether it was trained.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..cost import cache_bytes, layer_cache_bytes, num_parameters, stored_bytes, weight_bytes
from ..model.configuration_nemotron_h import NemotronHConfig
from ..tensors import checkpoint_tensors, kind_of
from ..units import human_bytes, parse_need
from .budgets import FIELDS_OF_KIND, SIZE_FIELDS, Budget, Elastic, heads_left, read_elastic
from .child import Child, child_of

FORMS = 'a fraction such as 0.5 or "50%", or a need such as "7GiB@32Ki"'


class Limit(NamedTuple):
    """What must fit: at most `most` parameters, or bytes of weights and of one sequence's cache of `num_tokens`."""

    most: float
    in_bytes: bool = False
    num_tokens: int = 0


@dataclass(frozen=True)
class Candidate:
    """A child that fits. `num_bytes` are weights and one sequence's cache at the asked context (0 tokens for a fraction).

    `loss` is in nats per token on the calibration text, None if nothing is known; `measured` says that it belongs to this
    budget and is not a sum over single changes.
    """

    child: Child
    num_bytes: int
    loss: float | None
    measured: bool

    @property
    def budget(self) -> Budget:
        """The child's."""
        return self.child.budget

    def describe(self) -> str:
        """One line for people."""
        known = "no loss is known" if self.loss is None else f"loss {self.loss:.3f}"
        if self.loss is not None:
            known += " measured" if self.measured else " predicted (a sum over single changes)"
        trained = "trained" if self.budget.trained else "NOT trained"
        size = f"{self.child.num_parameters:,} parameters, {human_bytes(self.num_bytes)}"
        return f"{size}; {known}; {trained}"


def rank_budgets(
    config: NemotronHConfig, request: str | float, dtype: torch.dtype | str | None = None, limit: int = 10
) -> list[Candidate]:
    """The children that fit a fraction or a need, the best first, at most `limit` of them.

    Args:
        dtype: of the weights and the KV cache, for needs in bytes; default the parent's, else bfloat16.

    Raises:
        ValueError: if the form is not known, or nothing is small enough.
    """
    elastic, dtype = read_elastic(config), str(dtype or config.dtype or "bfloat16").removeprefix("torch.")
    wanted = read_limit(config, request, list(elastic.budgets))
    count = limit + len(elastic.budgets)  # a combination may be what a budget is already
    named = [child_of(config, budget) for budget in elastic.budgets.values()]
    found = [
        (it.budget, _amount(it, wanted, dtype), it.budget.loss or predict_loss(config, elastic, it.budget))
        for it in named
    ]
    smallest = min((amount for _, amount, _ in found), default=math.inf)
    found = [one for one in found if one[1] <= wanted.most]
    for combinations in _combinations(config, elastic, wanted, dtype, str(request)):
        smallest = min(smallest, int(combinations.amounts.min()))
        found += combinations.best(wanted.most, count)
    if not found:
        raise ValueError(
            f"budget={request!r}: allowed is {_human(wanted, smallest, up=True)} or more, the smallest that this parent offers"
        )
    candidates, seen = [], []
    for budget, _, loss in sorted(found, key=_rank)[:count]:
        child = child_of(config, budget)
        resolved = (child.layers, child.config.to_dict())
        if resolved not in seen:
            seen.append(resolved)
            num_bytes = _bytes_of(child, wanted.num_tokens, dtype)
            candidates.append(Candidate(child, num_bytes, loss, budget.loss is not None))
    return candidates[:limit]


def read_limit(config: NemotronHConfig, request: str | float, names: list[str]) -> Limit:
    """What a fraction or a need asks for; `names` are those of the budgets, for the message."""
    text = str(request).strip()
    if (match := re.fullmatch(r"(\d*\.?\d+)(%?)", text)) and not isinstance(request, bool):
        fraction = float(match[1]) / (100 if match[2] else 1)
        if not 0 < fraction <= 1:
            raise ValueError(f"budget={request!r}: allowed is a fraction above 0 and up to 1, or 100%")
        return Limit(fraction * num_parameters(config))
    allowed = f"{', '.join(map(repr, names))}{', ' * bool(names)}{FORMS}"
    try:
        num_bytes, num_tokens = parse_need(text)
    except ValueError:
        raise ValueError(f"budget={request!r}: allowed are {allowed}") from None
    return Limit(num_bytes, in_bytes=True, num_tokens=num_tokens)


def predict_loss(config: NemotronHConfig, elastic: Elastic, budget: Budget) -> float | None:
    """The parent's loss plus what each of the budget's changes cost alone; None where the calibration does not tell."""
    base = elastic.calibration.get("loss")
    if base is None:
        return None
    sizes = {field: getattr(budget, field) for field in SIZE_FIELDS}
    if budget.num_key_value_heads is not None and isinstance(budget.num_attention_heads, int):
        whole = budget.num_attention_heads * config.num_key_value_heads // budget.num_key_value_heads
        sizes["num_attention_heads"] = whole  # as it is counted in the choices
    added = [_added_loss(config, elastic, field, size) for field, size in sizes.items()]
    loss = base + _added_loss(config, elastic, "layers", len(budget.kept_layers(config))) + sum(added)
    return loss if math.isfinite(loss) else None


def _added_loss(config: NemotronHConfig, elastic: Elastic, field: str, size: int | tuple[int, ...] | None) -> float:
    """What one change cost on the calibration text, infinite where that does not tell."""
    base = elastic.calibration.get("loss")
    whole = config.num_hidden_layers if field == "layers" else getattr(config, field)
    if size is None or size == whole:
        return 0.0
    known = {int(at): value for at, value in elastic.calibration.get(field, {}).items()}
    if isinstance(whole, int):
        known[whole] = base
    alone = _interpolate(known, size) if isinstance(size, int) and base is not None else None
    return math.inf if alone is None else alone - base


class _Combinations(NamedTuple):
    """Every combination of choices at one hidden size (m of them), at every depth (d)."""

    name: str
    hidden_size: int | None
    tables: list[list[dict[str, int | None]]]  # sizes of each kind of layer; the last varies fastest
    depths: list[tuple[int, ...] | None]
    amounts: Tensor  # (m, d) int64, of what is limited
    losses: Tensor  # (m, d) float64, infinite where nothing is known

    def best(self, most: float, count: int) -> list[tuple[Budget, int, float | None]]:
        """(budget, amount, loss) of the `count` lowest losses among those of at most `most`; the larger of equal ones."""
        amounts, losses = self.amounts.flatten(), self.losses.flatten()
        chosen = torch.nonzero(amounts <= math.floor(most)).flatten()
        if len(chosen) > count:
            ours = losses[chosen]
            last = ours.kthvalue(count).values
            below, equal = chosen[ours < last], chosen[ours == last]
            chosen = torch.cat([below, equal[amounts[equal].topk(count - len(below)).indices]])
        return [
            (self.budget(index), int(amounts[index]), float(losses[index]) if losses[index].isfinite() else None)
            for index in chosen.tolist()
        ]

    def budget(self, index: int) -> Budget:
        """The combination at a place of the flattened tensors."""
        index, depth = divmod(index, len(self.depths))
        sizes: dict[str, int | None] = {}
        for table in reversed(self.tables):
            index, entry = divmod(index, len(table))
            sizes |= table[entry]
        return Budget(name=self.name, hidden_size=self.hidden_size, layers=self.depths[depth], **sizes)


def _combinations(
    config: NemotronHConfig, elastic: Elastic, wanted: Limit, dtype: str, name: str
) -> Iterator[_Combinations]:
    """Amounts and predicted losses are sums over kinds of layers, and those of all combinations are sums of tables."""
    depths = _depths(config, elastic)
    short, places = _one_of_each(config)
    base = elastic.calibration.get("loss", math.inf)
    by_depth = [_added_loss(config, elastic, "layers", None if layers is None else len(layers)) for layers in depths]
    for hidden_size in _options(config, elastic, "hidden_size"):
        whole = base + _added_loss(config, elastic, "hidden_size", hidden_size)
        outside = _costs(_with(short, hidden_size=hidden_size), wanted, dtype)[None]
        amounts = torch.full((1, len(depths)), outside)
        losses = torch.tensor(by_depth, dtype=torch.float64)[None] + whole
        tables = []
        for kind in FIELDS_OF_KIND:
            if kind in (*config.layers_block_type, *(config.mtp_layers_block_type or ())):
                own = [index for index, found in enumerate(config.layers_block_type) if found == kind]
                kept = [[places[i] for i in own if layers is None or i in layers] for layers in depths]
                table, costs, added = [], [], []
                for sizes in product(*(_options(config, elastic, field) for field in FIELDS_OF_KIND[kind])):
                    fields = dict(zip(FIELDS_OF_KIND[kind], sizes))
                    added.append(sum(_added_loss(config, elastic, field, size) for field, size in fields.items()))
                    if kind == "full_attention":
                        heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
                        fields["num_attention_heads"] = heads_left(config, heads, groups)
                    table.append(fields)
                    cost = _costs(_with(short, hidden_size=hidden_size, **fields), wanted, dtype)
                    costs.append([cost.get(kind, 0) + sum(cost[i] for i in layers) for layers in kept])
                amounts = (amounts[:, None] + torch.tensor(costs)).flatten(0, 1)
                losses = (losses[:, None] + torch.tensor(added, dtype=torch.float64)[:, None]).flatten(0, 1)
                tables.append(table)
        yield _Combinations(name, hidden_size, tables, depths, amounts, losses)


def _amount(child: Child, wanted: Limit, dtype: str) -> int:
    """What is limited, of one child."""
    return _bytes_of(child, wanted.num_tokens, dtype) if wanted.in_bytes else child.num_parameters


def _bytes_of(child: Child, num_tokens: int, dtype: str) -> int:
    """Weights, and the cache of one sequence."""
    return weight_bytes(child.config, dtype) + cache_bytes(child.config, num_tokens, dtype)


def _options(config: NemotronHConfig, elastic: Elastic, field: str) -> list[int | None]:
    """Sizes that a field may take; None is the parent's own."""
    return [None, *(size for size in elastic.choices.get(field, ()) if size != getattr(config, field))]


def _depths(config: NemotronHConfig, elastic: Elastic) -> list[tuple[int, ...] | None]:
    """Layers that may stay: all (None), and what is left without the least important ones, of the calibrated counts."""
    counts = [int(count) for count in elastic.calibration.get("layers", {})]
    counts = counts or list(range(1, config.num_hidden_layers)) if elastic.layer_order else []
    kept = [tuple(sorted(elastic.layer_order[-count:])) for count in counts if 0 < count < config.num_hidden_layers]
    return [None, *kept]


def _one_of_each(config: NemotronHConfig) -> tuple[NemotronHConfig, list[int]]:
    """A configuration with one layer of each kind and sizes, and the place there of each of the parent's layers."""
    fields = sorted(config.PER_LAYER_FIELDS)
    alike = [
        (kind, *(config.size(field, index) for field in fields if config.PER_LAYER_FIELDS[field] == kind))
        for index, kind in enumerate(config.layers_block_type)
    ]
    first = {key: index for index, key in reversed(list(enumerate(alike)))}
    layers = tuple(sorted(first.values()))
    places = [layers.index(first[key]) for key in alike]
    return child_of(config, Budget(name="one of each", layers=layers)).config, places


def _costs(config: NemotronHConfig, wanted: Limit, dtype: str) -> dict[int | str | None, int]:
    """What is limited, by layer of the stack, by kind for multi-token prediction, and under None what is outside."""
    costs: dict[int | str | None, int] = {None: 0}
    for tensor in checkpoint_tensors(config):
        place = kind_of(config, tensor.layer) if tensor.kind == "mtp" else tensor.layer
        costs[place] = costs.get(place, 0) + (stored_bytes(tensor, dtype) if wanted.in_bytes else tensor.num_elements)
    if wanted.in_bytes:
        for index in range(config.num_hidden_layers):
            costs[index] += layer_cache_bytes(config, index, wanted.num_tokens, dtype)
    return costs


def _with(config: NemotronHConfig, **sizes: int | None) -> NemotronHConfig:
    """A configuration for formulas alone: other sizes, which were checked when the choices were read."""
    changed = copy.copy(config)
    if sizes.get("num_attention_heads") is None:
        heads = heads_left(config, config.num_attention_heads, sizes.get("num_key_value_heads"))
        sizes = {**sizes, "num_attention_heads": heads}
    vars(changed).update({field: size for field, size in sizes.items() if size is not None})
    return changed


def _rank(found: tuple[Budget, float, float | None]) -> tuple:
    """Lower is better: a known loss, the loss, a trained budget; without a loss the one that keeps most."""
    budget, amount, loss = found
    return (loss is None, loss or 0.0, not budget.trained, -amount)


def _interpolate(known: Mapping[int, float], size: int) -> float | None:
    """A loss between the calibrated sizes on either side; None outside of them."""
    below = max((at for at in known if at <= size), default=None)
    above = min((at for at in known if at >= size), default=None)
    if below is None or above is None:
        return None
    share = 0.0 if below == above else (size - below) / (above - below)
    return known[below] + share * (known[above] - known[below])


def _human(wanted: Limit, amount: float, up: bool = False) -> str:
    return human_bytes(amount, up=up) if wanted.in_bytes else f"{int(amount):,} parameters"
