"""Ranks candidates by next-token accuracy and agreement with the parent, on held-out text (MiniPuzzle, arXiv 2504.03624).

The candidates run as budgets of one memory image: a function gives the model of a combination of sizes, with all layers, as
views of the parent's weights, and a candidate is some of its blocks. Nothing is copied, built or loaded for it. A batch is
read once for all candidates; the parent predicts it once; and candidates that begin with the same layers in the same sizes
share what these compute.

    b batch, l length, v vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.linear import project
from ..model.loss import IGNORE, next_targets, positions_per_chunk
from .candidates import Candidate
from .observing import Pass, observe

ModelOfSizes = Callable[[Mapping[str, Any]], nn.Module]
"""Sizes without `layers` -> a NemotronHForCausalLM with all of the parent's layers."""


@dataclass
class Tally:
    """Sums over tokens of one candidate; `nats` is the loss."""

    correct: int = 0
    agreeing: int = 0
    nats: float = 0.0
    num_tokens: int = 0
    seconds: float = 0.0
    layers_run: int = 0

    def add(self, found: Predictions, parent: Predictions, targets: Tensor) -> None:
        """The predictions of one batch."""
        counted = targets != IGNORE
        self.correct += int((found.tokens == targets)[counted].sum())
        self.agreeing += int((found.tokens == parent.tokens)[counted].sum())
        self.nats += found.nats
        self.num_tokens += int(counted.sum())

    def result(self) -> dict[str, float]:
        """Accuracy, agreement, loss in nats per token, and what it took."""
        count = max(1, self.num_tokens)
        return {
            "accuracy": self.correct / count, "agreement": self.agreeing / count, "loss": self.nats / count,
            "seconds": self.seconds, "layers_run": self.layers_run,
        }  # fmt: skip


@dataclass
class Progress:
    """How far a ranking is: `batch` batches are done, and `position` candidates of the next one, in the order of `in_order`."""

    batch: int = 0
    position: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    parent: Tally = field(default_factory=Tally)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Progress:
        """From JSON."""
        tallies = {name: Tally(**tally) for name, tally in entry["tallies"].items()}
        return cls(entry["batch"], entry["position"], tallies, Tally(**entry["parent"]))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Predictions:
    """The most likely token behind each position (b, l), and the summed loss of those that count."""

    tokens: Tensor
    nats: float


@torch.no_grad()
def rank(
    parent: nn.Module, model_of: ModelOfSizes, candidates: Sequence[Candidate], batches: Sequence[Mapping[str, Tensor]],
    progress: Progress,
) -> Iterator[None]:  # fmt: skip
    """Go on with `progress` until all candidates have seen all batches; yields after each candidate of a batch."""
    ordered = in_order(candidates)
    for batch in batches[progress.batch :]:
        targets = targets_of(batch).to(parent.device)
        seen = observe(parent, batch, keep_states=False)
        known = predict(parent.lm_head, seen.hidden, targets)
        if progress.position == 0:
            progress.parent.add(known, known, targets)
        walk = Walk(model_of, seen, batch["input_ids"].to(parent.device))
        for candidate in ordered[progress.position :]:
            tally = progress.tallies.setdefault(candidate.name, Tally())
            start, before = time.perf_counter(), walk.layers_run
            tally.add(predict(*walk.run(candidate), targets), known, targets)
            tally.seconds += time.perf_counter() - start
            tally.layers_run += walk.layers_run - before
            progress.position += 1
            yield
        progress.batch, progress.position = progress.batch + 1, 0


class Walk:
    """Candidates on one batch, one after another; each goes on from the layers that it begins with as the one before did."""

    def __init__(self, model_of: ModelOfSizes, seen: Pass, input_ids: Tensor) -> None:
        self.model_of, self.seen, self.input_ids = model_of, seen, input_ids
        self.layers_run = 0
        self._sizes: Mapping[str, Any] | None = None

    def run(self, candidate: Candidate) -> tuple[nn.Module, Tensor]:
        """The head, and what enters it (b, l, hidden)."""
        sizes = shared_sizes(candidate)
        if sizes != self._sizes:
            self._enter(sizes)
        layers = candidate.sizes["layers"]
        shared = next((at for at, pair in enumerate(zip(layers, self._path)) if pair[0] != pair[1]), None)
        shared = min(len(layers), len(self._path)) if shared is None else shared
        del self._path[shared:], self._states[shared + 1 :]
        for layer in layers[shared:]:
            self._states.append(self.seen.run(self._blocks[layer], layer, self._states[-1]))
            self._path.append(layer)
            self.layers_run += 1
        return self._model.lm_head, self._model.model.norm_f(self._states[-1])

    def _enter(self, sizes: Mapping[str, Any]) -> None:
        self._sizes, self._model = sizes, self.model_of(sizes)
        stack = self._model.model
        self._blocks = dict(zip(sizes.get("layers", range(len(stack.layers))), stack.layers))
        self._path, self._states = [], [stack.embeddings(self.input_ids)]


def in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those of the same sizes together, and in each group those with the same first layers."""
    return sorted(candidates, key=lambda one: (str(shared_sizes(one)), one.sizes["layers"]))


def shared_sizes(candidate: Candidate) -> dict[str, Any]:
    """The sizes of the model that has a candidate's blocks: without its layers, unless sizes differ between these."""
    alone = {name: size for name, size in candidate.sizes.items() if name != "layers"}
    return candidate.sizes if any(isinstance(size, list) for size in alone.values()) else alone


def predict(lm_head: nn.Module, hidden: Tensor, targets: Tensor) -> Predictions:
    """From what enters the head (b, l, hidden), a part of the logits at a time; `targets` (b, l), -100 where none counts."""
    tokens, nats = [], 0.0
    parts = positions_per_chunk(lm_head.weight.shape[0], at_once=2)  # 128 MiB in fp32
    for rows, wanted in zip(hidden.flatten(0, 1).split(parts), targets.flatten().split(parts)):
        logits = project(lm_head, rows).float()  # (n, v)
        tokens.append(logits.argmax(-1))
        nats += float(F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum"))
    return Predictions(torch.cat(tokens).view(targets.shape), nats)


def targets_of(batch: Mapping[str, Tensor]) -> Tensor:
    """(b, l): the token behind each position, -100 at the end of a row and where the text has no label."""
    labels = batch.get("labels", batch["input_ids"])
    return next_targets(labels).view_as(labels)


def places(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Name -> mean of its places by accuracy and by agreement, 0 is the best; the lower the better."""
    total = dict.fromkeys(results, 0.0)
    for measure in ("accuracy", "agreement"):
        for place, name in enumerate(sorted(results, key=lambda one: (-results[one][measure], one))):
            total[name] += place / 2
    return total
