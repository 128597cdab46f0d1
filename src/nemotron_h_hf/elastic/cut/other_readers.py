"""The budget nearest to one that other readers cannot express: every layer of a kind with one size.

transformers' own `nemotron_h` reads one number for all layers of a kind. Each list of sizes becomes the largest single size
that does not make the model larger, so the result is never above the budget asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from ...tensors import num_groups
from ..budgets import SIZE_FIELDS, sizes_of_kept
from ..child import Child, child_of


def nearest_expressible(child: Child) -> Child:
    """The child with one size in the place of each list; itself if it has none."""
    nearest = child
    for field in child.parent.PER_LAYER_FIELDS:
        if field in SIZE_FIELDS and isinstance(getattr(nearest.config, field), list):
            for sizes in _allowed(nearest, field):
                if fitting := bisect_right(sizes, nearest.num_parameters, key=partial(_parameters, nearest, field)):
                    nearest = _with_size(nearest, field, sizes[fitting - 1])
                    break
    return nearest


def _with_size(child: Child, field: str, size: int) -> Child:
    return child_of(child.parent, replace(child.budget, trained=False, loss=None, **{field: size}))


def _parameters(child: Child, field: str, size: int) -> int:
    return _with_size(child, field, size).num_parameters


def _allowed(child: Child, field: str) -> Iterator[Sequence[int]]:
    """Single sizes that every kept layer has room for, ascending: the parent's choices, and all."""
    parent = child.parent
    largest = min(sizes_of_kept(parent, replace(child.budget, **{field: None}), field))
    step = num_groups(child.config, field)
    chosen = (parent.elastic or {}).get("choices", {}).get(field, [])
    yield sorted(size for size in chosen if size <= largest and size % step == 0)
    yield range(step, largest + 1, step)
