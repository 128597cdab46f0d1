"""The pictures of the report, as SVG: importance of layers, what candidates keep, memory against quality, the tournament."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .report import KINDS, Found

COLOURS = {"M": "#2a9d8f", "*": "#e63946", "-": "#8d99ae", "E": "#f4a261"}
SHOWN = 25  # candidates whose layers are drawn


def draw(found: Found) -> dict[str, str]:
    """Name -> SVG, of the stages that are done."""
    pictures = {}
    if "scores" in found:
        pictures["importance"] = _svg(importance, 3, found["scores"])
    if "ranked" in found:
        pictures["candidates"] = _svg(layers_kept, 4, found["scores"]["pattern"], found["ranked"])
        pictures["quality"] = _svg(quality, 4, found["candidates"], found["ranked"])
    if "tournament" in found:
        pictures["tournament"] = _svg(tournament, 3.5, found["tournament"])
    return pictures


def importance(axes: Axes, scores: dict[str, Any]) -> None:
    """A bar for each layer, as the paper's figure 7."""
    measure, values = next(iter(scores["importance"].items()))
    pattern = scores["pattern"]
    ranks = [values["rank"][str(layer)] for layer in range(len(pattern))]
    axes.bar(range(len(pattern)), ranks, color=[COLOURS[letter] for letter in pattern])
    axes.set(xlabel="layer", ylabel=f"mean rank ({measure})")
    axes.legend(handles=[Patch(color=COLOURS[letter], label=KINDS[letter]) for letter in dict.fromkeys(pattern)])


def layers_kept(axes: Axes, pattern: str, ranked: dict[str, Any]) -> None:
    """A row for each of the best candidates, a mark for each layer that it keeps, as the paper's figure 8."""
    shown = ranked["ranked"][:SHOWN]
    for row, one in enumerate(shown):
        layers = one["sizes"]["layers"]
        axes.scatter(layers, [row] * len(layers), marker="s", s=14, color=[COLOURS[pattern[layer]] for layer in layers])
    axes.set_yticks(range(len(shown)), [one["name"] for one in shown], fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="layers kept", xlim=(-1, len(pattern)))


def quality(axes: Axes, candidates: dict[str, Any], ranked: dict[str, Any]) -> None:
    """Cost against held-out loss, with the controls' losses as lines."""
    name = next(iter(candidates["limits"]))
    axes.scatter([one["costs"][name] for one in ranked["ranked"]], [one["loss"] for one in ranked["ranked"]], s=12)
    axes.axvline(candidates["limits"][name], color="black", linestyle=":", label="limit")
    axes.axhline(ranked["parent"]["loss"], color="black", label="teacher")
    for number, one in enumerate(one for one in ranked["controls"] if "loss" in one):
        axes.axhline(one["loss"], color=f"C{number + 1}", linestyle="--", label=one["rule"])
    axes.set(xlabel=name.replace("_", " "), ylabel="held-out loss (nats)")
    axes.legend(fontsize=7)


def tournament(axes: Axes, found: dict[str, Any]) -> None:
    """Held-out divergence before and after each round."""
    for name in found["rounds"][0]:
        entries = [entries[name] for entries in found["rounds"] if name in entries]
        losses = [entries[0]["before"], *(one["after"] for one in entries)]
        tokens = [number * found["tokens"] for number in range(len(losses))]
        axes.plot(tokens, losses, marker="o", linestyle="--" if name.startswith("control") else "-", label=name)
    axes.set(xlabel="tokens", ylabel="held-out KL (nats)", yscale="log")
    axes.legend(fontsize=7)


def _svg(plot, height: float, *content: Any) -> str:
    """Its markup, to stand inside a page; the same for the same content."""
    with matplotlib.rc_context({"svg.hashsalt": "minipuzzle", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, height), layout="constrained")
        plot(figure.subplots(), *content)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    markup = drawn.getvalue()
    return markup[markup.index("<svg") :]
