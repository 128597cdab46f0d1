"""Draw the loss curves of several runs in one plot.

    nemotron-h plot runs/a runs/b                                  # writes loss.png
    nemotron-h plot bf16=runs/a fp8=runs/b --output gap.png        # with your own names
    nemotron-h plot runs/a --y learning_rate --window 1            # any figure of metrics.jsonl
    nemotron-h plot runs/a --x step --y 'size_*,target_*'          # all that match, a curve each
    nemotron-h plot docs/results/tiny/*.jsonl --window 5           # any JSON lines like them

A RUN is a folder with metrics.jsonl (or log.jsonl), or such a file. The pale line is the log, the strong one
its running mean over --window lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nemotron_h_hf.command_line import argument, option, read_options
from nemotron_h_hf.whole_files import whole_file

LOG_FILES = ("metrics.jsonl", "log.jsonl")
LABELS = {
    "tokens": "training tokens (millions)",
    "step": "steps",
    "loss": "training loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}


@dataclass(frozen=True)
class PlotArguments:
    """What the command line says."""

    runs: list[str] = argument("folder or .jsonl file of a run, or NAME=one of these", nargs="+", metavar="RUN")
    output: str = option("loss.png", "PNG to write; replaced if it is there (loss.png)")
    x: str = option("tokens", "horizontal axis (tokens)", choices=("tokens", "step"))
    y: str = option("loss", "figures of the logs to draw, by commas; * stands for any letters (loss)")
    window: int = option(5, "lines in the running mean, 1 for none (5)")
    log_scale: bool = option(False, "logarithmic vertical axis")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the logs, draw, and print one line per run."""
    arguments = parse(argv)
    curves = {
        (name, y): read_curve(path, arguments.x, y)
        for name, path in named_runs(arguments.runs).items()
        for y in figures(path, arguments.y.split(","))
    }
    for (name, y), (xs, ys) in curves.items():
        last = running_mean(ys, arguments.window)[-1]
        print(f"{name}: {y} {last:.4g} at {arguments.x} {xs[-1]:,} (mean of {min(arguments.window, len(ys))} lines)")
    draw(curves, arguments)
    print(f"wrote {arguments.output}")
    return 0


def parse(argv: Sequence[str] | None) -> PlotArguments:
    """Read and check the command line."""
    arguments = read_options(PlotArguments, argv, "plot", __doc__)
    if not arguments.output.lower().endswith(".png"):
        raise ValueError(f"--output={arguments.output!r}: allowed is a name that ends in .png")
    if arguments.window < 1:
        raise ValueError(f"--window={arguments.window}: allowed is 1 or more")
    return arguments


def named_runs(runs: Sequence[str]) -> dict[str, Path]:
    """Name -> log file. The name is the one given, or that of the folder or file."""
    named: dict[str, Path] = {}
    for run in runs:
        name, _, place = run.rpartition("=") if not Path(run).exists() else ("", "", run)
        path = log_file(Path(place))
        name = name or (path.parent.name if path.name in LOG_FILES else path.stem)
        if name in named:
            raise ValueError(f"RUN {run}: {name!r} is the name of {named[name]} already; write NAME={run}")
        named[name] = path
    return named


def log_file(place: Path) -> Path:
    """The log of a run's folder, or the file itself."""
    if place.is_file():
        return place
    for name in LOG_FILES:
        if (place / name).is_file():
            return place / name
    raise ValueError(f"RUN {place}: there is no {' or '.join(LOG_FILES)}: allowed is a run's folder or a .jsonl file")


def figures(path: Path, patterns: Sequence[str]) -> list[str]:
    """The figures of a log that the patterns name, in the order of the log; a name without * or ? stands for itself."""
    plain = [pattern for pattern in patterns if not {"*", "?"} & set(pattern)]
    if len(plain) == len(patterns):
        return plain
    known = dict.fromkeys(name for row in read_rows(path) for name in row)
    missing = [name for name in plain if name not in known]
    found = [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if missing or not found:
        wanted = " ".join(missing or patterns)
        raise ValueError(f"--y: {path} has nothing that matches {wanted}; it has {', '.join(sorted(known))}")
    return found


def read_curve(path: Path, x: str, y: str) -> tuple[list[float], list[float]]:
    """The figures `x` and `y` of each line that has both."""
    rows = read_rows(path)
    points = [(row[x], row[y]) for row in rows if x in row and y in row]
    if not points:
        known = sorted({name for row in rows for name in row})
        raise ValueError(f"{path} has no line with {x} and {y}; it has {', '.join(known) or 'no lines'}")
    return [point[0] for point in points], [point[1] for point in points]


def read_rows(path: Path) -> list[dict[str, float]]:
    """The lines of a log; a last one that was cut short does not count."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    pieces = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(piece) / len(piece) for piece in pieces]


def draw(curves: dict[tuple[str, str], tuple[list[float], list[float]]], arguments: PlotArguments) -> None:
    """Write the PNG, whole or not at all."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot needs matplotlib: pip install 'nemotron-h-hf[plot]'") from None
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    unit = 1e6 if arguments.x == "tokens" else 1
    runs, ys_drawn = ({key[part] for key in curves} for part in (0, 1))
    for (run, y), (xs, ys) in curves.items():
        name = run if len(ys_drawn) == 1 else y if len(runs) == 1 else f"{run} {y}"
        xs = [x / unit for x in xs]
        [line] = axes.plot(
            xs, ys, alpha=0.25 if arguments.window > 1 else 1.0, label=None if arguments.window > 1 else name
        )
        if arguments.window > 1:
            axes.plot(xs, running_mean(ys, arguments.window), color=line.get_color(), label=name)
    axes.set(xlabel=LABELS[arguments.x], ylabel=", ".join(LABELS.get(y, y) for y in arguments.y.split(",")))
    axes.grid(alpha=0.3)
    axes.legend()
    if arguments.log_scale:
        axes.set_yscale("log")
    with whole_file(arguments.output) as part:
        figure.savefig(part, format="png")


if __name__ == "__main__":
    sys.exit(main())
