"""Measure speed and memory, next to transformers' own models and a floor that nothing can beat.

    nemotron-h bench cpu                                        # everything; use an idle machine
    nemotron-h bench cpu --only decode prefill --runs 7
    nemotron-h bench cpu --quick                                # a tiny model, to see that it runs; not its speed
    nemotron-h bench decode --model nemotron-h-8b --rows 1 64 --context 1024
    nemotron-h bench prefill --model path/to/checkpoint --context 8192 65536 --whole
    nemotron-h bench throughput --sides ours qwen2 llama --context 65536 --tokens-out 1024
    nemotron-h bench train --layers 4 --context 8192 --variants eager compiled fp8
    nemotron-h bench memory --context 1000000
    nemotron-h bench --suite gpu-10min --output docs/results/bench_gpu
    nemotron-h bench decode --device cpu --model tiny --context 64     # the same code where there is no GPU

`cpu` compares ours, transformers' `nemotron_h` and the model's Linear layers called alone, interleaved, in fp32. The others
run on a GPU: presets with random weights, checkpoints, or some layers of either, next to transformers' own model on the
same weights, Llama- and Qwen2-shaped models of equal size, and the floor: bytes and operations over the rates measured in
the same run. Nothing of ours is timed before its results agree with transformers' own. OUTPUT.json is whole after every
measurement; OUTPUT.png and a table come at the end.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from nemotron_h_hf.benchmark import device_run, report, suite
from nemotron_h_hf.benchmark.cpu_run import PARTS, QUICK, BenchArguments, Plan, measure
from nemotron_h_hf.whole_files import whole_file, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """`bench cpu`, one part on any device, or a suite of parts."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["cpu"]:
        return cpu(argv[1:])
    parser = argparse.ArgumentParser(
        prog="nemotron-h bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("cpu", *device_run.PARTS), help="what to measure")
    parser.add_argument("--suite", choices=(suite.NAME,), help="everything that the targets need, in one run")
    device_run.add_arguments(parser)
    chosen = parser.parse_args(argv)
    if (chosen.command is None) == (chosen.suite is None):
        parser.error("give one of cpu, " + ", ".join(device_run.PARTS) + f" and --suite {suite.NAME}")
    return on_device(chosen, shlex.join(["nemotron-h", "bench", *argv]))


def on_device(chosen: argparse.Namespace, command: str) -> int:
    """Measure one part, or the suite. Returns 0 also when a target is missed; the table and the JSON say so."""
    options = {name: value for name, value in vars(chosen).items() if name != "suite"}
    options["part"] = options.pop("command") or chosen.suite
    arguments = device_run.DeviceArguments(**{**options, "output": chosen.output or Path(f"bench_{options['part']}")})
    arguments.check()
    refuse_existing(arguments.output, arguments.overwrite)
    logging.set_verbosity_error()
    journal, found = device_run.run(arguments, command, outputs(arguments.output)[0], say)
    print("\n".join(device_run.table(journal, found)))
    say(f"wrote {journal.path}")
    if journal.rated():
        draw_plot("nemotron_h_hf.benchmark.device_plot", journal, outputs(arguments.output)[1])
    return 0


def cpu(argv: Sequence[str]) -> int:
    """Measure on this CPU. Returns 0 also when a target is missed; the table and the JSON say so."""
    arguments = parse(argv)
    plan = QUICK if arguments.quick else Plan()
    logging.set_verbosity_error()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        results = measure(plan, arguments, say)
    finally:
        torch.set_num_threads(threads_before)
    found = report.targets(results, plan.target_prefill_tokens)
    if arguments.quick:
        print("--quick: a tiny model; the targets are set for the full one and mean nothing here\n")
    print("\n".join(report.table(results, found)))
    settings = {**asdict(plan), "runs": arguments.runs, "threads": arguments.threads}
    command = shlex.join(["nemotron-h", "bench", "cpu", *argv])
    write(arguments, results, report.as_json(results, found, command, settings))
    return 0


def parse(argv: Sequence[str]) -> BenchArguments:
    """Read the command line, and refuse what would fail after an hour of measuring."""
    parser = argparse.ArgumentParser(prog="nemotron-h bench cpu", description="Measure speed and memory on this CPU.")
    parser.add_argument(
        "--output", type=Path, default=Path("bench_cpu"), help="files to write, without ending (bench_cpu)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--runs", type=int, default=5, help="rounds (5; decode takes 3 times as many, prompts over 4,096 one)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (2)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (all)")
    parser.add_argument("--prompts", nargs="+", type=int, help="lengths to prefill (256 1024 4096 16384)")
    parser.add_argument(
        "--long", action=argparse.BooleanOptionalAction, default=True, help="the prompt of 65,536 tokens (yes)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    arguments = BenchArguments(**vars(parser.parse_args(argv)))
    for option in ("runs", "threads", *(["prompts"] if arguments.prompts else [])):
        if min(as_list(getattr(arguments, option))) < 1:
            raise ValueError(f"--{option} is {getattr(arguments, option)}; it must be 1 or more")
    refuse_existing(arguments.output, arguments.overwrite)
    return arguments


def refuse_existing(prefix: Path, overwrite: bool) -> None:
    """Refuse to replace existing files unless --overwrite is given."""
    for path in outputs(prefix):
        if path.exists() and not overwrite:
            raise ValueError(f"--output: {path} is there already; --overwrite replaces it")


def as_list(value: int | list[int]) -> list[int]:
    """The numbers given to an option that takes one or several."""
    return value if isinstance(value, list) else [value]


def outputs(prefix: Path) -> tuple[Path, Path]:
    """The JSON file and the plot."""
    return prefix.with_name(prefix.name + ".json"), prefix.with_name(prefix.name + ".png")


def write(arguments: BenchArguments, results: report.Results, document: dict) -> None:
    """JSON and plot, each whole or not at all."""
    json_path, plot_path = outputs(arguments.output)
    write_json(json_path, document)
    say(f"wrote {json_path}")
    draw_plot("nemotron_h_hf.benchmark.plot", results, plot_path)


def draw_plot(module: str, results: object, path: Path) -> None:
    """The picture of a run, where matplotlib is installed."""
    try:
        draw = importlib.import_module(module).draw
    except ImportError as error:
        say(f"no plot: {error.name} is not installed; pip install 'nemotron-h-hf[plot]'")
        return
    with whole_file(path) as part:
        draw(results, part)
    say(f"wrote {path}")


def say(line: str) -> None:
    """Progress, apart from the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
