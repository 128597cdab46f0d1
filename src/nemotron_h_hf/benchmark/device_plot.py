"""The plot of a GPU benchmark: tokens per second of each part, with the floor above. Needs matplotlib."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import Journal, Measurement

COLOURS = {"ours": "tab:green", "native": "tab:orange", "llama": "tab:blue", "qwen2": "tab:purple", "vllm": "tab:red"}


def draw(journal: Journal, path: Path) -> None:
    """One panel for each part that has rates; always a PNG."""
    rated = journal.rated()
    parts = list(dict.fromkeys(m.part for m in rated))
    figure = Figure(figsize=(4.2 * len(parts), 4.2), dpi=120, layout="constrained")
    for index, part in enumerate(parts):
        panel(figure.add_subplot(1, len(parts), index + 1), part, [m for m in rated if m.part == part])
    figure.savefig(path, format="png")


def panel(axes: Axes, part: str, measurements: list[Measurement]) -> None:
    """A bar per measurement, and a line where the floor would have it end."""
    for place, m in enumerate(measurements):
        axes.bar(place, m.rate, color=COLOURS.get(m.side, "0.5"))
        if m.share_of_floor:
            axes.hlines(m.rate / m.share_of_floor, place - 0.4, place + 0.4, colors="0.3", linestyles="--")
    labels = [f"{m.side} {m.variant}\n{m.rows} x {m.context:,}" for m in measurements]
    axes.set_xticks(range(len(measurements)), labels, rotation=60, ha="right", fontsize="x-small")
    axes.set(title=part, ylabel="tokens/s (dashed: floor)", yscale="log")
