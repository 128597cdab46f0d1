"""The plot of a run: tokens per second of each part with the floor above it, and memory. Needs matplotlib."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .memory import GB
from .records import Journal, Measurement

COLOURS = {
    "ours": "tab:green", "native": "tab:orange", "llama": "tab:blue", "qwen2": "tab:purple", "vllm": "tab:red",
    "llama.cpp": "tab:cyan", "torchao": "tab:olive",
}  # fmt: skip


def draw(journal: Journal, path: Path) -> None:
    """One panel for each part that has rates, one for memory; always a PNG."""
    panels: list[tuple[Callable, str, list[Measurement]]] = []
    rated = [m for m in journal.measurements if m.rate is not None]
    for part in dict.fromkeys(m.part for m in rated):
        panels.append((speed_panel, part, [m for m in rated if m.part == part]))
    if held := [m for m in journal.measurements if m.part == "memory" and known_bytes(m)]:
        panels.append((memory_panel, "memory", held))
    widths = [max(3.0, 0.45 * len(shown) + 1.5) for _, _, shown in panels]
    figure = Figure(figsize=(sum(widths), 4.6), dpi=120, layout="constrained")
    for (panel, part, shown), axes in zip(
        panels, figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    ):
        panel(axes, part, shown)
    figure.savefig(path, format="png")


def speed_panel(axes: Axes, part: str, measurements: list[Measurement]) -> None:
    """A bar per measurement, and a line where the floor would have it end."""
    for place, m in enumerate(measurements):
        axes.bar(place, m.rate, color=COLOURS.get(m.side, "0.6"))
        if m.share_of_floor:
            axes.hlines(m.rate / m.share_of_floor, place - 0.4, place + 0.4, colors="0.3", linestyles="--")
    name_bars(axes, measurements)
    axes.set(title=part, ylabel="tokens/s (dashed: floor)", yscale="log")


def memory_panel(axes: Axes, part: str, measurements: list[Measurement]) -> None:
    """Peak memory; a hatched bar for a side that failed, as high as what it is known to need."""
    for place, m in enumerate(measurements):
        hatch = None if m.failure is None else "//"
        axes.bar(place, known_bytes(m) / GB, color=COLOURS.get(m.side, "0.6"), hatch=hatch)
    name_bars(axes, measurements)
    axes.set(title=part, ylabel="peak memory, GB (hatched: needs more)")


def known_bytes(m: Measurement) -> float:
    """Peak, or what a job that failed had got and asked for; 0 if neither is known."""
    return m.peak_bytes or m.figures.get("at_least_bytes", 0)


def name_bars(axes: Axes, measurements: list[Measurement]) -> None:
    """Side, variant, rows and tokens under each bar."""
    labels = [f"{m.side}, {m.variant}\n{m.rows} x {m.context:,}" for m in measurements]
    axes.set_xticks(range(len(measurements)), labels, rotation=60, ha="right", fontsize="x-small")
