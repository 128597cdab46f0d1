"""Cutting a model out of a larger one: which rows and columns of each of its tensors stay, and the tensors that this gives.

    kept = prefix(parent_config, budget.layers, child_config)    # or any other `Kept`: pruning, or a permutation of everything
    for cut in cuts(parent_config, kept): child[cut.name] = cut.of(parent[cut.source])

What is kept is said in the parent's own indices, layer by layer: one operation serves nested budgets (prefixes),
pruning (any indices) and reordering (all indices, in another order). It is exact: heads of a Mamba group share B, C and the
norm, so the same number stays in every group; a head's channels share only scalars, so each head may keep its own; query
heads stay with their key/value head. Names are those of checkpoint files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .model.configuration_nemotron_h import NemotronHConfig
from .model.weights import Name
from .tensors import AXES, AXIS_OF, Axis, WeightShape, axes_of, checkpoint_tensors, fields_of, num_groups, size, sizes


@dataclass(frozen=True)
class Kept:
    """What stays, as indices (int64) in the parent. The mappings are by the parent's layer; MTP layers follow the stack.

    hidden (d); neurons (f); heads (h), as many from each Mamba group, group by group; channels (h, p) of each kept head;
    key_value_heads (k); query_heads, as many of each key/value head, in the order of those; experts (e), as many of each expert group;
    expert_neurons (e, w) of each kept expert; shared_neurons (s).
    """

    layers: tuple[int, ...]
    hidden: Tensor
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    heads: Mapping[int, Tensor] = field(default_factory=dict)
    channels: Mapping[int, Tensor] = field(default_factory=dict)
    key_value_heads: Mapping[int, Tensor] = field(default_factory=dict)
    query_heads: Mapping[int, Tensor] = field(default_factory=dict)
    experts: Mapping[int, Tensor] = field(default_factory=dict)
    expert_neurons: Mapping[int, Tensor] = field(default_factory=dict)
    shared_neurons: Mapping[int, Tensor] = field(default_factory=dict)


class Cut(NamedTuple):
    """One tensor of the small model: `source` in the parent, and the rows and columns of it that stay (None: all)."""

    name: str
    source: str
    shape: tuple[int, ...]
    rows: Tensor | None
    columns: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """The small tensor, as a copy."""
        if self.rows is not None:
            tensor = tensor.index_select(0, self.rows.to(tensor.device))
        if self.columns is not None:
            tensor = tensor.index_select(1, self.columns.to(tensor.device))
        return tensor if self.rows is not None or self.columns is not None else tensor.clone()


def everything(config: NemotronHConfig) -> Kept:
    """All of a model, in its own order."""
    return prefix(config, range(config.num_hidden_layers), config)


def prefix(parent: NemotronHConfig, layers: Sequence[int], child: NemotronHConfig) -> Kept:
    """The first of everything, inside its group where there are groups, in the sizes of `child`, whose layers are `layers`."""
    kept: dict[str, dict[int, Tensor]] = {axis.name: {} for axis in AXES if axis.kind}
    for index, own, kind in _layer_pairs(parent, layers, child):
        for axis in axes_of(kind):
            first = _first(axis, (parent, index), (child, own))
            kept[axis.name][index] = first.expand(len(kept[axis.within][index]), -1) if axis.within else first
    return Kept(tuple(layers), torch.arange(child.hidden_size), **kept)


def _first(axis: Axis, parent: tuple[NemotronHConfig, int], child: tuple[NemotronHConfig, int]) -> Tensor:
    """Of an axis of a layer of the parent the first indices of each group, as many as in the child's: int64."""
    groups = [num_groups(config, axis.field) for config, _ in (parent, child)]
    whole, kept = (size(config, axis.field, layer) for config, layer in (parent, child))
    return torch.arange(whole).view(groups[0], -1)[: groups[1], : kept // groups[1]].flatten()


def kept_config(parent: NemotronHConfig, kept: Kept) -> NemotronHConfig:
    """The configuration of what stays, without budgets."""
    entry = entry_without_sizes(parent, kept.layers)
    entry["hidden_size"] = len(kept.hidden)
    stack = set(kept.layers)
    for axis in AXES:
        of = getattr(kept, axis.name) if axis.kind else {}
        found = [indices.shape[-1] for index, indices in sorted(of.items()) if index in stack]
        more = [indices.shape[-1] for index, indices in sorted(of.items()) if index >= parent.num_hidden_layers]
        if len({*found, *more}) > 1 and axis.field not in parent.PER_LAYER_FIELDS:
            raise ValueError(f"{axis.field}={found + more}: allowed is one size for every layer")
        if found or more:
            entry[axis.field] = one_or_list(found, more)
    return type(parent).from_dict(entry)


def one_or_list(sizes: Sequence[int | None], mtp_sizes: Sequence[int | None]) -> int | None | list[int | None]:
    """How a configuration says the sizes of the stack's layers of a kind, and of those of multi-token prediction: as one,
    as a list, or as a list that goes on with the latter where they are not all the largest."""
    if len({*sizes, *mtp_sizes}) == 1:
        return [*sizes, *mtp_sizes][0]
    if not sizes or None in sizes or set(mtp_sizes) - {max(sizes)}:
        return [*sizes, *mtp_sizes]
    return list(sizes)


def entry_without_sizes(parent: NemotronHConfig, layers: Sequence[int]) -> dict[str, Any]:
    """The parent's configuration with these of its layers and without budgets; their sizes are still the parent's."""
    entry = parent.plain_dict()
    for derived in ("elastic", "hybrid_override_pattern", "num_hidden_layers"):
        entry.pop(derived, None)
    kinds, count = parent.layers_block_type, parent.num_hidden_layers
    for name, kind in parent.PER_LAYER_FIELDS.items():
        if isinstance(getattr(parent, name), list):
            stack = [parent.size(name, index) for index in layers if kinds[index] == kind]
            more = [parent.size(name, index) for index in parent.layers_with(kind) if index >= count]
            entry[name] = one_or_list(stack, more) if stack or more else []
    return {**entry, "layers_block_type": [kinds[index] for index in layers]}


def cuts(parent: NemotronHConfig, kept: Kept, child: NemotronHConfig | None = None) -> Iterator[Cut]:
    """Every tensor of the small model in the order of its depth, with where it comes from.

    Raises:
        ValueError: if `kept` does not give the shapes that `child` (by default `kept_config`) asks for.
    """
    child = kept_config(parent, kept) if child is None else child
    for tensor in checkpoint_tensors(child):
        layer, source = _in_parent(parent, child, kept, tensor)
        words = [*tensor.row.shape.split(), "1"][:2]
        for place in tensor.places():
            if place.expert is not None:
                source = source._replace(expert=int(kept.experts[layer][place.expert]))
            rows, columns = (_indices(parent, kept, word, layer, place.expert) for word in words)
            pairs = zip(tensor.shape, (rows, columns, None))
            shape = tuple(whole if indices is None else len(indices) for whole, indices in pairs)
            if shape != tensor.shape:
                raise ValueError(f"{place.released} would be {shape} from what is kept, the configuration asks for "
                                 f"{tensor.shape}")  # fmt: skip
            yield Cut(place.released, source.released, shape, rows, columns)


def kept_of(
    parent: NemotronHConfig, kept: Kept, letter: str, layer: int | None, expert: int | None = None
) -> Tensor | None:
    """What stays of one letter of a layer (tensors.py), of the product of its fields: int64; None where it is never cut."""
    fields, found = fields_of(parent, letter, layer), None
    for name in fields if AXIS_OF.keys() & fields else ():
        if (axis := AXIS_OF.get(name)) is None:
            indices = torch.arange(size(parent, name, layer))
        else:
            indices = getattr(kept, axis.name)
            indices = indices if axis.kind is None else indices[layer]
            indices = indices[expert] if axis.within == "experts" else indices
        found = indices if found is None else (found[:, None] * size(parent, name, layer) + indices).flatten()
    return found


def runs(indices: Tensor) -> list[tuple[int, int]]:
    """Indices as [start, stop) runs of successive ones, in order: what can be read or viewed in one piece."""
    breaks = (torch.nonzero(indices.diff() != 1).flatten() + 1).tolist()
    starts, stops = [0, *breaks], [*breaks, len(indices)]
    return [(int(indices[start]), int(indices[stop - 1]) + 1) for start, stop in zip(starts, stops)]


def _layer_pairs(
    parent: NemotronHConfig, layers: Sequence[int], child: NemotronHConfig
) -> Iterator[tuple[int, int, str]]:
    """(layer in the parent, layer in the child, kind), multi-token prediction after the stack."""
    yield from ((index, own, parent.layers_block_type[index]) for own, index in enumerate(layers))
    for step, kind in enumerate(parent.mtp_layers_block_type or []):
        yield parent.num_hidden_layers + step, child.num_hidden_layers + step, kind


def _in_parent(
    parent: NemotronHConfig, child: NemotronHConfig, kept: Kept, tensor: WeightShape
) -> tuple[int | None, Name]:
    """The layer of the parent that `kept` knows a tensor by, and its name there; MTP layers keep their numbers."""
    if tensor.layer is None:
        return None, tensor.place
    if tensor.layer >= child.num_hidden_layers:
        return parent.num_hidden_layers + tensor.layer - child.num_hidden_layers, tensor.place
    return kept.layers[tensor.layer], tensor.place._replace(layer=kept.layers[tensor.layer])


def _indices(parent: NemotronHConfig, kept: Kept, word: str, layer: int | None, expert: int | None) -> Tensor | None:
    """The rows (or columns) that stay, of parts one after another; None where nothing is ever cut."""
    letters = word.split("+")
    parts = [kept_of(parent, kept, letter, layer, expert) for letter in letters]
    if len(parts) == 1:
        return parts[0]
    of = sizes(parent, layer)
    starts = accumulate((of[letter] for letter in letters), initial=0)
    return torch.cat([start + (torch.arange(of[letter]) if part is None else part)
                      for start, letter, part in zip(starts, letters, parts)])  # fmt: skip
