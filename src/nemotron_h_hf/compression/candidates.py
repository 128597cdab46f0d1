"""Every smaller model that fits: counts of attention, MLP, MoE and Mamba layers, and sizes (MiniPuzzle, arXiv 2504.03624).

The search is conditional: counts and sizes say how much stays, importance says which layers (and, in a model whose weights
are ordered, which neurons) these are. A limit is on a cost that is a sum over layers: bytes of a deployment, parameters,
those active for a token, KV bytes per token, seconds of a table. Costs grow with every count and size; of the models that
fit, those are kept that nothing can be added to, unless all are asked for.

    a candidate: {"name": "a5-m45-f48-w30720", "sizes": {"layers": [0, 1, ...], "intermediate_size": 30720}, "counts": {...},
                  "costs": {"bytes": ..., "parameters": ..., ...}}       `sizes` is a budget of the teacher
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cost import bytes_per_element, cache_elements, elements_per_token, layers_of_kind
from ..errors import require
from ..memory_model import Deployment, memory_by_layer
from ..model.configuration_nemotron_h import NemotronHConfig
from ..slicing import entry_without_sizes
from ..tensors import checkpoint_tensors
from ..units import human_bytes

KINDS = {"attention": "full_attention", "mamba": "linear_attention", "mlp": "mlp", "moe": "moe"}
"""Names for people -> kinds of layers, in the order of names and grids."""
LETTERS = {"full_attention": "a", "linear_attention": "m", "mlp": "f", "moe": "e", "intermediate_size": "w",
           "moe_intermediate_size": "x", "hidden_size": "d", "mamba_num_heads": "h", "mamba_head_dim": "p",
           "num_attention_heads": "q", "n_routed_experts": "n", "moe_shared_expert_intermediate_size": "s"}  # fmt: skip
CostByLayer = Callable[[NemotronHConfig], Mapping[int | None, float]]
"""Configuration -> what each layer costs, and under None what is outside of the layers."""


@dataclass(frozen=True)
class Candidate:
    """One smaller model."""

    name: str
    sizes: dict[str, Any]
    counts: dict[str, int]
    costs: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Found(NamedTuple):
    """The candidates, how many models there are in the grid, and how many of them fit."""

    candidates: list[Candidate]
    num_models: int
    num_fitting: int


def costs_of(deployment: Deployment) -> dict[str, CostByLayer]:
    """The costs that need no measuring, by name."""
    return {
        "bytes": partial(memory_by_layer, deployment=deployment),
        "parameters": parameters_by_layer,
        "active_parameters": partial(parameters_by_layer, active=True),
        "kv_bytes_per_token": partial(kv_bytes_by_layer, dtype=deployment.dtype("kv")),
    }


def find_candidates(
    config: NemotronHConfig,
    importance: Mapping[int, float],
    sizes: Mapping[str, Sequence[int]],
    counts: Mapping[str, Sequence[int]],
    costs: Mapping[str, CostByLayer],
    limits: Mapping[str, float],
    keep: str = "largest",
) -> Found:
    """The models that fit, the one with most parameters first.

    Args:
        importance: layer -> the larger the more important.
        sizes: field of the configuration -> sizes to try, for all layers of the kind alike.
        counts: name of a kind ("attention", ...) -> least and most layers of it; default: 1 to all.
        costs: by name; all of them are told of each candidate.
        limits: name of a cost -> the most.
        keep: "largest": those that nothing can be added to; "all".

    Raises:
        ValueError: for limits that nothing fits, or that the teacher itself fits.
    """
    require(keep in ("largest", "all"), "keep", keep, "largest, all")
    require(bool(limits), "budget", None, "at least one limit, such as 31.7GiB@1M")
    grid = _Grid.of(config, importance, sizes, counts, costs)
    fits = torch.stack([grid.amounts[name] <= most for name, most in limits.items()]).all(0)
    _refuse_useless(config, grid, costs, limits, fits)
    chosen = fits if keep == "all" else fits & ~_can_grow(fits)
    found = [grid.candidate(place) for place in torch.nonzero(chosen).tolist()]
    found.sort(key=lambda one: (-one.costs["parameters"], one.name))
    return Found(found, fits.numel(), int(fits.sum()))


@dataclass(frozen=True)
class _Grid:
    """All combinations: a dimension for each field of sizes (ascending), then one for the count of each kind."""

    fields: dict[str, list[int]]
    orders: dict[str, list[int]]  # kind -> its layers, the most important first
    counts: dict[str, range]
    amounts: dict[str, Tensor]  # cost -> fp64, (sizes..., counts...)

    @classmethod
    def of(cls, config, importance, sizes, counts, costs) -> _Grid:
        fields = {field: sorted(set(values)) for field, values in sizes.items()}
        orders = {
            kind: sorted(layers_of_kind(config, kind), key=lambda layer: (-importance[layer], layer))
            for kind in KINDS.values()
            if kind in config.layers_block_type
        }
        ranges = read_counts(counts, {kind: len(order) for kind, order in orders.items()})
        shape = [*map(len, fields.values()), *map(len, ranges.values())]
        amounts = {name: [] for name in costs}
        for combination in itertools.product(*fields.values()):
            whole = with_sizes(config, dict(zip(fields, combination)))
            for name, cost in costs.items():
                amounts[name].append(_over_counts(cost(whole), orders, ranges))
        return cls(fields, orders, ranges, {name: torch.stack(parts).view(shape) for name, parts in amounts.items()})

    def candidate(self, place: Sequence[int]) -> Candidate:
        sizes = {field: values[at] for (field, values), at in zip(self.fields.items(), place)}
        numbers = {kind: span[at] for (kind, span), at in zip(self.counts.items(), place[len(sizes) :])}
        layers = sorted(layer for kind, number in numbers.items() for layer in self.orders[kind][:number])
        parts = [f"{LETTERS[kind]}{number}" for kind, number in numbers.items()]
        parts += [f"{LETTERS.get(field, field)}{size}" for field, size in sizes.items()]
        costs = {name: amounts[tuple(place)].item() for name, amounts in self.amounts.items()}
        counts = {name: numbers[kind] for name, kind in KINDS.items() if kind in numbers}
        return Candidate("-".join(parts), {"layers": layers, **sizes}, counts, costs)


def read_counts(counts: Mapping[str, Sequence[int]], there: Mapping[str, int]) -> dict[str, range]:
    """Kind -> the numbers of layers to try.

    Raises:
        ValueError: for a kind that the model lacks, or numbers that it does not have.
    """
    names = {name: kind for name, kind in KINDS.items() if kind in there}
    for name in counts:
        require(name in names, "counts", name, ", ".join(names))
    found = {}
    for name, kind in names.items():
        span = counts.get(name, (1, there[kind]))
        pair = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(number) is int for number in span)
        right = pair and 0 <= span[0] <= span[1] <= there[kind]
        require(right, f"counts.{name}", span, f"least and most, 0 to {there[kind]}")
        found[kind] = range(span[0], span[1] + 1)
    return found


def with_sizes(config: NemotronHConfig, sizes: Mapping[str, int]) -> NemotronHConfig:
    """The configuration with all of its layers in other sizes."""
    return type(config).from_dict({**entry_without_sizes(config, range(config.num_hidden_layers)), **sizes})


def parameters_by_layer(config: NemotronHConfig, active: bool = False) -> Counter[int | None]:
    """Elements of each layer; `active`: without the routed experts that a token is not sent to."""
    found: Counter[int | None] = Counter()
    for tensor in checkpoint_tensors(config):
        found[tensor.stack_layer] += elements_per_token(config, tensor) if active else tensor.num_elements
    return found


def kv_bytes_by_layer(config: NemotronHConfig, dtype: str) -> dict[int | None, float]:
    """What a further token adds to the cache of each layer."""
    size = bytes_per_element(dtype)
    return {layer: cache_elements(config, layer).kv * size for layer in layers_of_kind(config, "full_attention")}


def _over_counts(
    cost: Mapping[int | None, float], orders: Mapping[str, list[int]], ranges: Mapping[str, range]
) -> Tensor:
    """What every combination of counts costs: outside, and for each kind the sum over its most important layers."""
    total = torch.tensor(float(cost.get(None, 0)), dtype=torch.float64)
    for kind, order in orders.items():
        sums = torch.tensor([0.0, *itertools.accumulate(cost.get(layer, 0) for layer in order)], dtype=torch.float64)
        total = total[..., None] + sums[ranges[kind].start : ranges[kind].stop]
    return total


def _can_grow(fits: Tensor) -> Tensor:
    """Whether one more layer of a kind, or the next size, fits too."""
    grows = torch.zeros_like(fits)
    for dim, length in enumerate(fits.shape):
        grows.narrow(dim, 0, length - 1).logical_or_(fits.narrow(dim, 1, length - 1))
    return grows


def _refuse_useless(config, grid: _Grid, costs, limits: Mapping[str, float], fits: Tensor) -> None:
    whole = {name: math.fsum(costs[name](config).values()) for name in limits}
    if all(whole[name] <= most for name, most in limits.items()):
        told = ", ".join(f"{name}={amount(name, value)}" for name, value in whole.items())
        raise ValueError(f"budget: the teacher itself fits ({told}): allowed is less than it takes")
    for name, most in limits.items():
        least = grid.amounts[name].min().item()
        require(
            least <= most, name, amount(name, most), f"{amount(name, least, up=True)} or more, the smallest in the grid"
        )
    told = ", ".join(f"{name}={amount(name, most)}" for name, most in limits.items())
    require(bool(fits.any()), "budget", told, "limits that one model of the grid fits together")


def amount(name: str, value: float, up: bool = False) -> str:
    """A cost for people; large bytes to the hundredth of a GiB, as limits are close."""
    if "bytes" in name:
        return human_bytes(value, digits=2 if value >= 2**30 else 1, up=up)
    return f"{value:,.0f}" if value >= 1 else f"{value:.4g}"


def read_candidates(entries: Sequence[Mapping[str, Any]]) -> Iterator[Candidate]:
    """From JSON."""
    return (Candidate(**entry) for entry in entries)
