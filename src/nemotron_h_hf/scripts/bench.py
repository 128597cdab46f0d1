"""Measure speed and memory, next to transformers' own models and a floor that nothing can beat.

    nemotron-h bench cpu                                        # everything; use an idle machine
    nemotron-h bench cpu --only decode prefill --runs 7 --gguf f32.gguf
    nemotron-h bench cpu --quick                                # a tiny model, to see that it runs; not its speed
    nemotron-h bench decode --model nemotron-h-8b --rows 1 64 --context 1024
    nemotron-h bench prefill --model path/to/checkpoint --context 8192 65536 --whole
    nemotron-h bench throughput --sides ours qwen2 llama --context 65536 --tokens-out 1024
    nemotron-h bench train --layers 4 --context 8192 --variants eager compiled fp8
    nemotron-h bench memory --context 1000000
    nemotron-h bench --suite gpu-10min --output docs/results/bench_gpu
    nemotron-h bench decode --device cpu --model tiny --context 64     # the same code where there is no GPU

Presets with random weights, checkpoints, or some layers of either, next to transformers' own model on the same weights, Llama-
and Qwen2-shaped models of equal size, and the floor: bytes and operations over the rates measured in the same run. `cpu` is a
suite for CPUs, with the model's Linear layers called alone, int8 and bf16 weights, a busy machine, and llama.cpp. Models that
share weights are timed in turns. Nothing of ours is timed before its results agree with transformers' own. OUTPUT.json is
whole after every measurement; OUTPUT.png and a table come at the end.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from nemotron_h_hf.benchmark import cpu_suite, gpu_suite, run, summary
from nemotron_h_hf.benchmark.records import Journal
from nemotron_h_hf.command_line import add_options
from nemotron_h_hf.whole_files import whole_file


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one part, or a suite. Returns 0 also when a target is missed; the table and the JSON say so."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv)
    json_path, plot_path = outputs(arguments.output)
    logging.set_verbosity_error()
    journal = run.run(arguments, shlex.join(["nemotron-h", "bench", *argv]), json_path, say)
    if arguments.quick:
        print("--quick: a tiny model; the targets are set for the full one and mean nothing here\n")
    print("\n".join(summary.table(journal)))
    say(f"wrote {json_path}")
    draw_plot(journal, plot_path)
    return 0


def parse(argv: Sequence[str]) -> run.Arguments:
    """Read the command line, and refuse what would fail after an hour of measuring."""
    parser = argparse.ArgumentParser(
        prog="nemotron-h bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = (cpu_suite.NAME, *run.PARTS)
    parser.add_argument("command", nargs="?", choices=commands, help="what to measure")
    parser.add_argument("--suite", choices=(gpu_suite.NAME,), help="everything that the targets need, in one run")
    add_options(parser, run.Arguments)
    options = vars(parser.parse_args(argv))
    command, suite = options.pop("command"), options.pop("suite")
    if (command is None) == (suite is None):
        parser.error(f"give one of {', '.join(commands)} and --suite {gpu_suite.NAME}")
    part = command or suite
    arguments = run.Arguments(**{**options, "part": part, "output": options["output"] or Path(f"bench_{part}")})
    arguments.check()
    for path in outputs(arguments.output):
        if path.exists() and not arguments.overwrite:
            raise ValueError(f"--output: {path} is there already; --overwrite replaces it")
    return arguments


def outputs(prefix: Path) -> tuple[Path, Path]:
    """The JSON file and the plot."""
    return prefix.with_name(prefix.name + ".json"), prefix.with_name(prefix.name + ".png")


def draw_plot(journal: Journal, path: Path) -> None:
    """The picture of a run that has figures, where matplotlib is installed."""
    if not any(m.rate or m.peak_bytes for m in journal.measurements):
        return
    try:
        draw = importlib.import_module("nemotron_h_hf.benchmark.plot").draw
    except ImportError as error:
        say(f"no plot: {error.name} is not installed; pip install 'nemotron-h-hf[plot]'")
        return
    with whole_file(path) as part:
        draw(journal, part)
    say(f"wrote {path}")


def say(line: str) -> None:
    """Progress, apart from the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
