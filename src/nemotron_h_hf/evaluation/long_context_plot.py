"""The plot of long-context results: a heat map of the needle, and a line per task over the length. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(rows: Sequence[dict], title: str, path: Path) -> None:
    """Write a PNG of rows as `long_context.summarise` gives them; the heat map is there if samples have depths."""
    by_depth = [row for row in rows if row["depth"] is not None]
    panels = [lambda axes: lines(axes, [row for row in rows if row["depth"] is None])]
    if by_depth:
        panels.insert(0, lambda axes: heat_map(axes, by_depth))
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(1, len(panels), index + 1))
    figure.savefig(path, format="png")


def heat_map(axes: Axes, rows: Sequence[dict]) -> None:
    """Length across, depth down, the score as colour and number; of the first task that has depths."""
    task = rows[0]["task"]
    scores = {(row["depth"], row["length"]): 100 * row["score"] for row in rows if row["task"] == task}
    depths, lengths = (sorted({key[axis] for key in scores}) for axis in (0, 1))
    cells = [[scores.get((depth, length), math.nan) for length in lengths] for depth in depths]
    image = axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            axes.text(j, i, "" if math.isnan(cell) else f"{cell:.0f}", ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(title=f"{task}: answers found, percent", xlabel="tokens", ylabel="depth of the needle")
    axes.figure.colorbar(image, ax=axes)


def lines(axes: Axes, rows: Sequence[dict]) -> None:
    """Score over length, one line per task, with its standard error."""
    for index, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
        mine = sorted((row for row in rows if row["task"] == task), key=lambda row: row["length"])
        axes.errorbar(
            [row["length"] for row in mine], [100 * row["score"] for row in mine],
            yerr=[100 * (row["stderr"] or 0) for row in mine], fmt="osv^Dx*Ph<"[index % 10] + "-", capsize=2, label=task,
        )  # fmt: skip
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    axes.set(title="expected strings found, percent", xlabel="tokens", ylim=(-3, 103))
    axes.legend(fontsize="x-small")


def short(length: int) -> str:
    """131072 -> 128Ki; lengths that are no multiple of 1024 as they are."""
    return f"{length // 1024}Ki" if length % 1024 == 0 else f"{length:,}"
