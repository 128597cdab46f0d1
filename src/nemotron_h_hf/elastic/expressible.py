"""The budget nearest to one that other readers cannot express: every layer of a kind with one size.

transformers' own `nemotron_h` reads one number for all layers of a kind. Each list of sizes becomes the largest single size
that does not make the model larger, so the result is never above the budget asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from ..cost import num_parameters
from ..model.configuration_nemotron_h import NemotronHConfig
from .budgets import Budget, budget_config, num_groups, sizes_of_kept


def nearest_expressible(parent: NemotronHConfig, budget: Budget) -> Budget:
    """`budget` with one size in the place of each list; itself if it has none."""
    nearest = budget
    for field in parent.PER_LAYER_FIELDS:
        child = budget_config(parent, nearest)
        if isinstance(getattr(child, field), list):
            count_of = partial(_parameters, parent, nearest, field)
            for sizes in _allowed(parent, nearest, field):
                if fitting := bisect_right(sizes, num_parameters(child), key=count_of):
                    nearest = replace(nearest, **{field: sizes[fitting - 1]})
                    break
    return nearest if nearest is budget else replace(nearest, trained=False, loss=None)


def _parameters(parent: NemotronHConfig, budget: Budget, field: str, size: int) -> int:
    return num_parameters(budget_config(parent, replace(budget, **{field: size})))


def _allowed(parent: NemotronHConfig, budget: Budget, field: str) -> Iterator[Sequence[int]]:
    """Single sizes that every kept layer has room for, ascending: the parent's choices, and all."""
    largest = min(sizes_of_kept(parent, replace(budget, **{field: None}), field))
    step = num_groups(parent, field)
    chosen = (parent.elastic or {}).get("choices", {}).get(field, [])
    yield sorted(size for size in chosen if size <= largest)
    yield range(step, largest + 1, step)
