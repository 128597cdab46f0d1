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
    """One panel below the other: for each part that has rates, and for memory; always a PNG."""
    panels: list[tuple[Callable, str, list[Measurement]]] = []
    rated = [m for m in journal.measurements if m.rate is not None]
    for part in dict.fromkeys(m.part for m in rated):
        panels.append((speed_panel, part, [m for m in rated if m.part == part]))
    if held := [m for m in journal.measurements if m.part == "memory" and known_bytes(m)]:
        panels.append((memory_panel, "memory", held))
    heights = [0.28 * len(shown) + 1 for _, _, shown in panels]
    figure = Figure(figsize=(9, sum(heights)), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (panel, part, shown), axes in zip(panels, rows):
        panel(axes, part, shown)
    figure.savefig(path, format="png")


def speed_panel(axes: Axes, part: str, measurements: list[Measurement]) -> None:
    """A bar per measurement, and a line where the floor would have it end."""
    draw_bars(axes, measurements, [m.rate for m in measurements], ",.4g")
    for place, m in enumerate(measurements):
        if m.share_of_floor:
            axes.vlines(m.rate / m.share_of_floor, place - 0.4, place + 0.4, colors="0.2", linestyles=":")
    axes.set(title=part, xlabel="tokens/s (dotted: the floor)")


def memory_panel(axes: Axes, part: str, measurements: list[Measurement]) -> None:
    """Peak memory; a hatched bar for a side that failed, as high as what it is known to need."""
    draw_bars(axes, measurements, [known_bytes(m) / GB for m in measurements], ".3g")
    axes.set(title=part, xlabel="peak memory, GB (hatched: needs more)")


def known_bytes(m: Measurement) -> float:
    """Peak, or what a job that failed had got and asked for; 0 if neither is known."""
    return m.peak_bytes or m.figures.get("at_least_bytes", 0)


def draw_bars(axes: Axes, measurements: list[Measurement], values: list[float], form: str) -> None:
    """Side, variant, rows and tokens next to each bar, the first on top; a logarithmic axis where values lie far apart."""
    colours = [COLOURS.get(m.side, "0.6") for m in measurements]
    bars = axes.barh(range(len(measurements)), values, color=colours, height=0.8)
    for bar, m in zip(bars, measurements):
        bar.set_hatch(None if m.failure is None else "//")
    axes.bar_label(bars, [f" {value:{form}}" for value in values], fontsize="x-small")
    labels = [f"{m.side}, {m.variant}, {m.rows} x {m.context:,}" for m in measurements]
    axes.set_yticks(range(len(measurements)), labels, fontsize="x-small")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    if max(values) > 100 * min(values):
        axes.set_xscale("log")
