"""A budget of a parent, resolved: the small model's configuration, and which of the parent's layers and indices it keeps.

    child = resolve(parent_config, "6b")        # any form of a budget, see resolve.py
    model = NemotronHForCausalLM(child.config)
    for cut in child.cuts(): ...                # its tensors, and where in the parent's they come from

Masks, cuts, loaders, views and counts all take this object: a budget is checked when it becomes one, and nowhere after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..cost import num_parameters
from ..model.configuration_nemotron_h import NemotronHConfig
from ..slicing import Cut, Kept, cuts, entry_without_sizes, one_or_list, prefix
from .budgets import SIZE_FIELDS, Budget, check_budget, heads_left, sizes_of_kept


@dataclass(frozen=True, eq=False)
class Child:
    """One nested model of `parent`; `config` is plain: no budgets in it, lists of sizes only where they differ."""

    parent: NemotronHConfig
    budget: Budget
    config: NemotronHConfig

    @property
    def name(self) -> str:
        """The budget's."""
        return self.budget.name

    @property
    def layers(self) -> tuple[int, ...]:
        """The parent's layers that stay."""
        return self.budget.kept_layers(self.parent)

    @cached_property
    def kept(self) -> Kept:
        """The parent's indices that stay: the first of everything, inside its group where there are groups."""
        return prefix(self.parent, self.layers, self.config)

    @property
    def num_parameters(self) -> int:
        """Stored elements of the small model."""
        return num_parameters(self.config)

    def is_whole(self) -> bool:
        """Whether this is the parent itself."""
        ours, theirs = self.config.plain_dict(), self.parent.plain_dict()
        return ours == {name: value for name, value in theirs.items() if name != "elastic"}

    def cuts(self) -> Iterator[Cut]:
        """Every tensor of the small model in the order of its depth, with where it comes from."""
        return cuts(self.parent, self.kept, self.config)


def child_of(parent: NemotronHConfig, budget: Budget) -> Child:
    """The child of a `Budget`.

    Raises:
        ValueError: unless the budget fits inside the parent.
    """
    check_budget(parent, budget)
    entry = entry_without_sizes(parent, budget.kept_layers(parent))
    for field in SIZE_FIELDS:
        if field in parent.PER_LAYER_FIELDS:
            entry[field] = _sizes(parent, budget, field)
        elif (size := getattr(budget, field)) is not None:
            entry[field] = size
    config = type(parent).from_dict(entry)
    config._attn_implementation = parent._attn_implementation
    config.mamba_implementation = parent.mamba_implementation
    return Child(parent, budget, config)


def _sizes(parent: NemotronHConfig, budget: Budget, field: str) -> int | list[int]:
    """What the child's configuration says of a field that may differ by layer. Layers of multi-token prediction that the
    parent names keep their sizes, those above the budget's largest have that."""
    sizes, value = sizes_of_kept(parent, budget, field), getattr(parent, field)
    kind, count = parent.PER_LAYER_FIELDS[field], parent.num_hidden_layers
    if isinstance(value, list) and len(value) > parent.layers_block_type.count(kind):
        more = [parent.size(field, index) for index in parent.layers_with(kind) if index >= count]
        if getattr(budget, field) is not None:
            more = [min(size, max(sizes, default=_one(parent, budget, field))) for size in more]
        return one_or_list(sizes, more)
    if not sizes:
        return _one(parent, budget, field)
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)


def _one(parent: NemotronHConfig, budget: Budget, field: str) -> int:
    """A size for a kind of layer that is gone from the stack; multi-token prediction may still have it."""
    value = getattr(budget, field)
    if value is None:
        whole = getattr(parent, field)
        value = heads_left(parent, whole, budget.num_key_value_heads) if field == "num_attention_heads" else whole
    return value if isinstance(value, int) else max(value, default=1)
