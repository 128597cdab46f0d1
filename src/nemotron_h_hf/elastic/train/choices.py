"""The axes that a router decides on: which sizes each layer may take, the masks that a soft choice makes, and the budget of
a hard one.

A choice is a distribution over an axis's sizes, one row for all layers or one per layer; index 0 is the parent's own size.
Masks are the mean of the sizes' prefixes, sum_i pi_i I_i (Nemotron Elastic, arXiv 2511.16664, eq. 51), inside each group
where there are groups. The axis `layers` says how many layers stay; the first of `layer_order` go first.

    r rows (1, or a layer each), c choices, D hidden, L layers, f neurons, h Mamba heads, p head channels, a query heads,
    k key/value heads
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.configuration_nemotron_h import NemotronHConfig
from ...tensors import AXIS_OF, num_groups, size
from ..budgets import CHOICE_FIELDS, Budget, check_budget, heads_left
from ..masks import Masks

DEPTH = "layers"
FIELDS = (*CHOICE_FIELDS, DEPTH)
Probabilities = Mapping[str, Tensor]
"""Field -> (r, c), rows that sum to 1."""


@dataclass(frozen=True)
class Axis:
    """One field of a budget and what it may be.

    `layers` are the parent's layers that have this size, () where it is the whole model's. `sizes` has a row for each of
    them (or one row): the size at each choice, the parent's own first.
    """

    field: str
    layers: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    per_layer: bool = False

    @property
    def num_rows(self) -> int:
        """Choices made: one, or one for each layer."""
        return len(self.layers) if self.per_layer else 1

    @property
    def num_choices(self) -> int:
        """Sizes to choose from."""
        return len(self.sizes[0])

    def expected(self, probabilities: Tensor) -> Tensor:
        """(r, c) -> the expected size of each layer, (len(layers)), or (1) of the whole model."""
        sizes = torch.tensor(self.sizes, dtype=probabilities.dtype, device=probabilities.device)
        return (probabilities * sizes).sum(-1)


def axes_of(
    config: NemotronHConfig, choices: Mapping[str, Sequence[int]], per_layer: Collection[str] = ()
) -> tuple[Axis, ...]:
    """The axes of a run, in the order of `FIELDS`.

    Args:
        choices: field -> sizes that may be chosen; `layers` -> how many layers stay. The parent's own is added.
        per_layer: fields for which every layer chooses for itself.

    Raises:
        ValueError: for an unknown field, sizes that do not fit the parent, or per-layer choices of what is one size.
    """
    for field in choices:
        if field not in FIELDS:
            raise ValueError(f"choices={field!r}: allowed are {', '.join(FIELDS)}")
    for field in per_layer:
        allowed = [name for name in config.PER_LAYER_FIELDS if name in choices]
        if field not in allowed:
            raise ValueError(f"per_layer={field!r}: allowed are {', '.join(allowed) or 'none of these choices'}")
    return tuple(_axis(config, field, choices[field], field in per_layer) for field in FIELDS if field in choices)


def full(axes: Sequence[Axis]) -> dict[str, Tensor]:
    """The choice of the parent itself: one-hot rows at index 0."""
    return one_hot(axes, {axis.field: [0] * axis.num_rows for axis in axes})


def one_hot(axes: Sequence[Axis], indices: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Field -> (r, c) float32 of hard choices."""
    return {
        axis.field: torch.nn.functional.one_hot(torch.tensor(indices[axis.field]), axis.num_choices).float()
        for axis in axes
    }


def masks_of(
    config: NemotronHConfig, axes: Sequence[Axis], probabilities: Probabilities, layer_order: Sequence[int] = ()
) -> Masks:
    """The masks of a choice, on its device, differentiable in it; a hard choice gives those of its budget."""
    masks = Masks()
    heads, channels, key_value_heads = {}, {}, {}
    places = vars(masks) | {"heads": heads, "channels": channels, "key_value_heads": key_value_heads}
    for axis in axes:
        chosen = probabilities[axis.field]
        if axis.field == "hidden_size":
            masks.hidden = chosen[0] @ prefixes(axis.sizes[0]).to(chosen)
        elif axis.field == DEPTH:
            shares = chosen[0] @ kept_layers(axis.sizes[0], layer_order).to(chosen)
            masks.layers = shares if shares.requires_grad else shares.cpu()  # zeros are looked for in it
        else:
            places[AXIS_OF[axis.field].name].update(_masks_of_layers(config, axis, chosen))
    for layer in sorted({*heads, *channels}):
        sizes = (config.size(field, layer) for field in ("mamba_num_heads", "mamba_head_dim"))
        found = next(mask for mask in (heads.get(layer), channels.get(layer)) if mask is not None)
        of_heads, of_channels = (
            found.new_ones(size) if mask is None else mask
            for size, mask in zip(sizes, (heads.get(layer), channels.get(layer)))
        )
        masks.channels[layer] = of_heads[:, None] * of_channels  # (h, p)
    for layer, mask in key_value_heads.items():
        mask = mask.repeat_interleave(config.size("num_attention_heads", layer) // len(mask))  # (k) -> (a)
        masks.query_heads[layer] = masks.query_heads[layer] * mask if layer in masks.query_heads else mask
    return masks


def prefixes(sizes: Sequence[int], num_groups: int = 1) -> Tensor:
    """(c, width) of 0 and 1: the first size / num_groups of each group of the widest, sizes[0]."""
    place = torch.arange(sizes[0]) % (sizes[0] // num_groups)
    return (place < torch.tensor(sizes)[:, None] // num_groups).float()


def kept_layers(counts: Sequence[int], layer_order: Sequence[int]) -> Tensor:
    """(c, L) of 0 and 1: of L = counts[0] layers that many stay, and the first of `layer_order` do not."""
    rank = torch.tensor(layer_order).argsort()  # of each layer, 0 the least important
    return (rank >= counts[0] - torch.tensor(counts)[:, None]).float()


def budget_of(
    config: NemotronHConfig,
    axes: Sequence[Axis],
    indices: Mapping[str, Sequence[int]],
    name: str,
    layer_order: Sequence[int] = (),
    **more: object,
) -> Budget:
    """The budget of hard choices (index by row); sizes are left out where they are the parent's.

    Args:
        more: other fields of the budget: trained, loss.
    """
    kept = range(config.num_hidden_layers)
    sizes: dict[str, object] = {}
    for axis in axes:
        if axis.field == DEPTH and (index := indices[DEPTH][0]):
            stays = kept_layers(axis.sizes[0], layer_order)[index]
            sizes[DEPTH] = kept = tuple(stays.nonzero().flatten().tolist())
    for axis in axes:
        if axis.field != DEPTH and any(indices[axis.field]):
            rows = list(indices[axis.field]) * (1 if axis.per_layer else len(axis.sizes))
            layers = axis.layers or kept[:1]  # one size of the whole model does not depend on the layers
            found = [of[row] for of, row, layer in zip(axis.sizes, rows, layers) if layer in kept]
            if found:
                sizes[axis.field] = found[0] if len(set(found)) == 1 else tuple(found)
    if "num_attention_heads" in sizes:
        sizes["num_attention_heads"] = heads_left(
            config, sizes["num_attention_heads"], sizes.get("num_key_value_heads")
        )
    return Budget(name=name, **sizes, **more)


def _axis(config: NemotronHConfig, field: str, sizes: Sequence[int], per_layer: bool) -> Axis:
    kind = AXIS_OF[field].kind if field in AXIS_OF else None
    layers = tuple(index for index, found in enumerate(config.layers_block_type) if found == kind)
    if kind is not None and not layers:
        raise ValueError(f"choices.{field}: the model has no {kind} layer: allowed is no such choice")
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"choices.{field}={sizes!r}: allowed are positive integers")
    if field == DEPTH:
        own = [config.num_hidden_layers]
    else:
        own = [size(config, field, layer) for layer in layers] or [getattr(config, field)]
    if max(sizes) > max(own):
        raise ValueError(f"choices.{field}={max(sizes)}: allowed is at most the parent's {max(own)}")
    smaller = sorted({smaller for smaller in sizes if smaller < max(own)}, reverse=True)
    table = tuple((width, *(min(width, size) for size in smaller)) for width in own)
    for column in zip(*table) if field != DEPTH else ():
        value = column if field in config.PER_LAYER_FIELDS else column[0]
        check_budget(config, Budget(name=f"choices.{field}", **{field: value}))
    return Axis(field, layers, table, per_layer)


def _masks_of_layers(config: NemotronHConfig, axis: Axis, chosen: Tensor) -> dict[int, Tensor]:
    """Layer -> its mask; layers of one choice and one size share a tensor."""
    made: dict[tuple, Tensor] = {}
    masks = {}
    for position, (layer, sizes) in enumerate(zip(axis.layers, axis.sizes)):
        row = position if axis.per_layer else 0
        if (row, sizes) not in made:
            made[row, sizes] = chosen[row] @ prefixes(sizes, num_groups(config, axis.field)).to(chosen)
        masks[layer] = made[row, sizes]
    return masks
