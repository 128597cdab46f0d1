"""A plot of the scores of each axis. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ...compression.depth import Removal
from ...slicing import Kept
from .elasticize import Parent
from .scores import SHOWN


def draw_scores(folder: Path, parent: Parent) -> list[Path]:
    """Write `scores_AXIS.png` for every axis that there is; the files."""
    importance, order = parent.importance, parent.order
    panels = {"hidden": lambda axes: _hidden(axes, importance.hidden, order)}
    for axis in SHOWN:
        if layers := getattr(importance, axis.name):
            panels[axis.name] = lambda axes, title=axis.title, layers=layers: _layers(axes, title, layers)
    if importance.expert_neurons:
        panels["expert_neurons"] = lambda axes: _experts(axes, importance.expert_neurons)
    if parent.removals:
        panels["depth"] = lambda axes: _depth(axes, parent.removals)
    files = []
    for name, panel in panels.items():
        figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
        panel(figure.add_subplot())
        files.append(folder / f"scores_{name}.png")
        figure.savefig(files[-1])
    return files


def _hidden(axes: Axes, scores: Tensor, order: Kept) -> None:
    axes.plot(scores[order.hidden] / scores.max(), color="tab:blue")
    axes.set(title="hidden channels", xlabel="rank", ylabel="score / the largest", yscale="log")


def _layers(axes: Axes, title: str, layers: Mapping[int, Tensor]) -> None:
    """Sorted scores, a line for each layer; of channels, a line for each head."""
    colours = colormaps["viridis"]
    for place, (index, scores) in enumerate(layers.items()):
        ranked = scores.sort(dim=-1, descending=True).values
        lines = ranked if ranked.dim() == 2 else ranked[None]
        for number, line in enumerate(lines):
            label = f"layer {index}" if number == 0 else None
            marker = "." if len(line) < 50 else None
            positive = line.clamp(min=1e-6 * float(scores.max()))  # neurons that never fire score 0
            axes.plot(
                positive / scores.max(), color=colours(place / len(layers)), label=label, marker=marker, linewidth=1
            )
    axes.set(title=title, xlabel="rank in the layer", ylabel="score / the layer's largest", yscale="log")
    if len(layers) <= 12:
        axes.legend(fontsize="small")


def _experts(axes: Axes, layers: Mapping[int, Tensor]) -> None:
    """Sorted scores of each expert's neurons; a line for each layer, the mean over its experts."""
    means = {index: scores.sort(dim=-1, descending=True).values.mean(0) for index, scores in layers.items()}
    _layers(axes, "neurons of the routed experts, mean over experts", means)


def _depth(axes: Axes, removals: list[Removal]) -> None:
    first = removals[0].scores
    axes.bar(list(first), list(first.values()), color="0.8", label="alone")
    chosen = {removal.layer: removal.scores[removal.layer] for removal in removals}
    axes.plot(list(chosen), list(chosen.values()), "o", color="tab:red", label="when it was removed (1, 2, ...)")
    for step, (layer, score) in enumerate(chosen.items(), 1):
        axes.annotate(str(step), (layer, score), xytext=(0, 4), textcoords="offset points", ha="center")
    axes.set(title="layers", xlabel="layer", ylabel="normalised squared error of the logits", yscale="log")
    axes.legend(fontsize="small")
