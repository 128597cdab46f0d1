"""How much each layer matters: what becomes of the model's output without it (MiniPuzzle, arXiv 2504.03624; Puzzle, 2411.19146).

    hidden    mean squared error of the activation behind the last norm; the paper's
    logits    squared error of the logits over the square of the whole model's (Nemotron Elastic, arXiv 2511.16664, eq. 5)
    cosine    1 - cos(what enters the layer, what leaves it); what other tools take, the layers after it do not run

For the last one, one pass is enough. For the others a branch leaves the pass at each layer and runs what follows, so that all L
layers together cost 1 + (L - 1) / 2 forwards; a narrower layer is another branch at the same place.

Errors of single removals do not add up; what they give is an order. By default it is that of the mean over samples of a
layer's rank in the sample, as a few samples would decide over the mean of the errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from ..model.linear import project
from .observing import Pass, observe

OF_WIDTHS = ("hidden", "logits")  # these score narrower layers too
MEASURES = (*OF_WIDTHS, "cosine")
REDUCTIONS = ("rank", "mean")
Narrower = Mapping[int, Mapping[int, nn.Module]]
"""Layer -> size -> the block that takes its place."""


@dataclass
class LayerScores:
    """measure -> branch -> one error for each sample. A branch is a layer taken out, "5", or a narrower one, "5:192"."""

    errors: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples that were scored so far."""
        branches = next(iter(self.errors.values()), {})
        return len(next(iter(branches.values()), []))

    def importance(self, measure: str = "hidden", reduce: str = "rank") -> dict[int, float]:
        """Layer -> the larger the more important: the mean rank among the layers (0 is the least), or the mean error."""
        require(measure in self.errors, "layer_scores", measure, ", ".join(self.errors) or "a measure that was taken")
        require(reduce in REDUCTIONS, "reduce", reduce, ", ".join(REDUCTIONS))
        layers = {int(branch): errors for branch, errors in self.errors[measure].items() if ":" not in branch}
        table = torch.tensor([layers[index] for index in sorted(layers)], dtype=torch.float64)  # (layers, samples)
        values = table if reduce == "mean" else table.argsort(dim=0, stable=True).argsort(dim=0).double()
        return dict(zip(sorted(layers), values.mean(1).tolist()))

    def narrowed(self, measure: str = "hidden") -> dict[int, dict[int, float]]:
        """Layer -> size -> mean error; size 0 is the layer taken out."""
        found: dict[int, dict[int, float]] = {}
        for branch, errors in self.errors[measure].items():
            layer, _, size = branch.partition(":")
            found.setdefault(int(layer), {})[int(size or 0)] = sum(errors) / len(errors)
        return found


def accumulate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], scores: LayerScores, measures: Sequence[str] = MEASURES,
    narrower: Narrower | None = None,
) -> Iterator[int]:  # fmt: skip
    """Add batches of a NemotronHForCausalLM's text to `scores`; yields the samples done after each.

    Memory: a hidden state of the batch for each layer and narrower block.
    """
    for measure in measures:
        require(measure in MEASURES, "layer_scores", measure, ", ".join(MEASURES))
    for batch in batches:
        for measure, branches in errors_of(model, batch, measures, narrower or {}).items():
            known = scores.errors.setdefault(measure, {})
            for branch, errors in branches.items():
                known.setdefault(branch, []).extend(errors)
        yield scores.num_samples


@torch.no_grad()
def errors_of(
    model: nn.Module, batch: Mapping[str, Tensor], measures: Sequence[str], narrower: Narrower
) -> dict[str, dict[str, list[float]]]:
    """measure -> branch -> an error for each row of the batch."""
    seen = observe(model, batch)
    found: dict[str, dict[str, list[float]]] = {measure: {} for measure in measures}
    if "cosine" in found:
        found["cosine"] = {str(index): _turned(*seen.states[index : index + 2]) for index in range(len(seen.arguments))}
    compared = [measure for measure in measures if measure != "cosine"]
    if not compared:
        return found
    whole = {measure: _output(model, seen.hidden, measure) for measure in compared}
    for branch, state in _branches(model, seen, narrower).items():
        hidden = model.model.norm_f(state)
        for measure in compared:
            error = (whole[measure] - _output(model, hidden, measure)).square().flatten(1).sum(1, dtype=torch.float64)
            scale = (
                whole[measure].square().flatten(1).sum(1, dtype=torch.float64)
                if measure == "logits"
                else whole[measure][0].numel()
            )
            found[measure][branch] = (error / scale).tolist()
    return found


def _branches(model: nn.Module, seen: Pass, narrower: Narrower) -> dict[str, Tensor]:
    """Branch -> its state before the last norm. All advance together, a layer at a time: each layer's weights are read once."""
    states: dict[str, Tensor] = {}
    for index, block in enumerate(model.model.layers):
        states = {branch: seen.run(block, index, state) for branch, state in states.items()}
        before, seen.states[index] = seen.states[index], None
        states[str(index)] = before
        for size, other in narrower.get(index, {}).items():
            states[f"{index}:{size}"] = seen.run(other, index, before)
    return states


def _output(model: nn.Module, hidden: Tensor, measure: str) -> Tensor:
    return (project(model.lm_head, hidden) if measure == "logits" else hidden).float()


def _turned(before: Tensor, after: Tensor) -> list[float]:
    """1 - cosine, mean over tokens, for each row."""
    return (1 - F.cosine_similarity(before.double(), after.double(), dim=-1)).mean(1).tolist()
