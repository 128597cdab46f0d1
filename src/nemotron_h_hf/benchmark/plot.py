"""The plot of a benchmark run: prefill over length, decoding, a training step and its memory. Needs matplotlib."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from .memory import Footprint
from .report import MB, Results
from .timing import Timing

COLOURS = {"floor": "0.6", "linear": "0.8", "native": "tab:orange", "ours": "tab:green"}
LABELS = {"floor": "Linear layers", "linear": "torch's\nlinear", "native": "transformers", "ours": "nemotron_h_hf"}
INT8_COLOURS = {"fp32": "tab:green", "torchao": "tab:orange", "int8": "tab:blue", "int8_head": "tab:cyan"}
INT8_LABELS = {"fp32": "fp32", "torchao": "torchao", "int8": "int8", "int8_head": "int8,\nlm_head"}


def draw(results: Results, path: Path) -> None:
    """Write one panel for each part that was measured; always a PNG."""
    panels = []
    if results.prefill:
        panels.append(lambda axes: prefill_panel(axes, results.prefill))
    if results.decode:
        panels.append(lambda axes: decode_panel(axes, results.decode))
    if results.int8:
        panels.append(lambda axes: int8_panel(axes, results.int8))
    if results.train:
        panels.append(lambda axes: train_panel(axes, results.train))
    if results.train_memory:
        panels.append(lambda axes: memory_panel(axes, "training step", results.train_memory))
    if results.long_memory:
        panels.append(lambda axes: memory_panel(axes, f"prefill {results.long_tokens:,}", results.long_memory))
    figure = Figure(figsize=(4.2 * len(panels), 3.4), dpi=120, layout="constrained")
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(1, len(panels), index + 1))
    figure.savefig(path, format="png")


def prefill_panel(axes: Axes, timings: list[Timing]) -> None:
    """Tokens per second over prompt length, one line per side, least to largest as a band."""
    for side, colour in COLOURS.items():
        there = [timing for timing in timings if side in timing.samples]
        lengths = [timing.num_tokens for timing in there]
        axes.plot(lengths, [t.num_tokens / t.median(side) for t in there], "o-", color=colour, label=LABELS[side])
        slow = [t.num_tokens / max(t.samples[side]) for t in there]
        fast = [t.num_tokens / min(t.samples[side]) for t in there]
        axes.fill_between(lengths, slow, fast, color=colour, alpha=0.25, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks([timing.num_tokens for timing in timings], [f"{timing.num_tokens:,}" for timing in timings])
    axes.set(title="prefill", xlabel="prompt tokens", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def decode_panel(axes: Axes, timing: Timing) -> None:
    """Tokens per second of single steps."""
    rates = {side: timing.num_tokens / timing.median(side) for side in timing.samples}
    bars(axes, rates, "decode", "tokens/s")


def int8_panel(axes: Axes, timing: Timing) -> None:
    """Tokens per second of single steps with weights in fp32 and int8."""
    rates = {side: timing.num_tokens / timing.median(side) for side in timing.samples}
    bars(axes, rates, timing.name, "tokens/s", INT8_LABELS, INT8_COLOURS)


def train_panel(axes: Axes, timing: Timing) -> None:
    """Seconds of forward and backward."""
    bars(axes, {side: timing.median(side) for side in timing.samples}, timing.name, "seconds")


def memory_panel(axes: Axes, name: str, memory: dict[str, Footprint]) -> None:
    """Peak memory beyond the weights; a hatched bar for a side that failed, as high as what it is known to need."""
    known = {side: (footprint.extra_bytes or footprint.at_least_bytes or 0) / MB for side, footprint in memory.items()}
    drawn = bars(axes, known, f"{name}: peak memory", "MB beyond the weights")
    for bar, footprint in zip(drawn, memory.values(), strict=True):
        if footprint.extra_bytes is None:
            bar.set_hatch("//")
            middle = bar.get_x() + bar.get_width() / 2
            axes.annotate("needs more", (middle, 0), rotation=90, ha="center", va="bottom")


def bars(
    axes: Axes,
    heights: dict[str, float],
    title: str,
    unit: str,
    labels: dict[str, str] = LABELS,
    colours: dict[str, str] = COLOURS,
) -> BarContainer:
    """One labelled bar per side."""
    drawn = axes.bar(
        [labels[side] for side in heights], list(heights.values()), color=[colours[side] for side in heights]
    )
    axes.bar_label(drawn, fmt="{:,.3g}" if max(heights.values()) < 100 else "{:,.0f}")
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.12)
    axes.tick_params(axis="x", labelsize="small")
    return drawn
