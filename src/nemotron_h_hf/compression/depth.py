"""Which layers matter least: remove the one whose absence changes the logits least, and again, from what is left.

The change is the normalised squared error of the logits M (Nemotron Elastic, arXiv 2511.16664, eq. 5), sums over tokens
and vocabulary:

    s_j = sum (M_full - M_without_j)^2 / sum M_full^2

Scores of single removals do not add up (two layers may replace each other), hence one at a time. Removing r of L
layers takes (L + 1) + L + ... , r terms, forward passes over the calibration rows: the reference and each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Mapping[str, Tensor], frozenset[int]], Tensor]
"""(batch, layers left out) -> logits (b, l, vocabulary)."""


@dataclass(frozen=True)
class Removal:
    """One step: `layer` went, and what the logits would have lost with each layer that was still there."""

    layer: int
    scores: dict[int, float]


def num_passes(num_layers: int, num_removals: int) -> int:
    """Forward passes over the calibration rows."""
    return sum(num_layers + 1 - step for step in range(num_removals))


def remove_layers(
    logits: Logits,
    batches: Sequence[Mapping[str, Tensor]],
    num_layers: int,
    num_removals: int,
    done: Iterable[Removal] = (),
    passed: Callable[[], object] = lambda: None,
) -> Iterator[Removal]:
    """The removals after those that are `done`, one at a time; `passed` is called after each forward of a batch.

    Raises:
        ValueError: unless `num_removals` leaves a layer.
    """
    if not 0 <= num_removals < num_layers:
        raise ValueError(f"num_removals={num_removals}: allowed is 0 to {num_layers - 1}, because a layer must stay")
    gone = [removal.layer for removal in done]
    while len(gone) < num_removals:
        left = [layer for layer in range(num_layers) if layer not in gone]
        scores = errors_without(logits, batches, frozenset(gone), left, passed)
        removal = Removal(min(left, key=lambda layer: scores[layer]), scores)
        gone.append(removal.layer)
        yield removal


@torch.no_grad()
def errors_without(
    logits: Logits,
    batches: Sequence[Mapping[str, Tensor]],
    gone: frozenset[int],
    candidates: Sequence[int],
    passed: Callable[[], object] = lambda: None,
) -> dict[int, float]:
    """s of each candidate leaving on top of those that are gone; the reference is always the whole model."""
    errors, total = dict.fromkeys(candidates, 0.0), 0.0
    for batch in batches:
        full = logits(batch, frozenset()).float()
        total += float(full.square().sum(dtype=torch.float64))
        passed()
        for layer in candidates:
            without = logits(batch, gone | {layer}).float()
            errors[layer] += float((full - without).square().sum(dtype=torch.float64))
            passed()
    return {layer: error / total for layer, error in errors.items()}


def layer_order(removals: Sequence[Removal]) -> list[int]:
    """All layers, the least important first: as they were removed, then the rest by their last scores."""
    last = removals[-1]
    rest = sorted((layer for layer in last.scores if layer != last.layer), key=lambda layer: last.scores[layer])
    return [*(removal.layer for removal in removals), *rest]
