"""Measure speed and memory, beside transformers' own model and a floor that nobody can beat.

    nemotron-h bench cpu                                        # everything; best on a machine that does nothing else
    nemotron-h bench cpu --only decode prefill --runs 7
    nemotron-h bench cpu --output docs/results/bench_cpu --overwrite
    nemotron-h bench cpu --quick                                # a tiny model: does it run, not how fast

All sides are measured in one run, taking turns, with the same random weights in fp32: ours, transformers' `nemotron_h`,
and the floor, the model's Linear layers called alone at the same shapes. Before anything is timed, logits, cached
decoding and gradients must agree. Writes OUTPUT.json (every sample) and OUTPUT.png, prints a table with the targets.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging

from nemotron_h_hf.benchmark import gate, memory, report, sides, timing

PARTS = ("decode", "prefill", "train", "long")
DECODE_ROUNDS = 3  # times those of the rest: a sample lasts under a second, and one busy moment would colour it


@dataclass(frozen=True)
class Plan:
    """What is measured; lengths in tokens. The defaults are what the targets are set for."""

    shape: sides.Shape = field(default_factory=sides.Shape)
    prefill_tokens: tuple[int, ...] = (256, 1024, 4096, 16384)
    target_prefill_tokens: int = 4096
    decode_context: int = 1024
    decode_steps: int = 16
    train_tokens: int = 2048
    long_tokens: int = 65536
    long_limit_bytes: int = 2 * report.GB  # what transformers' model is given beyond the weights


QUICK = Plan(
    sides.Shape("M-M*-", 64, 128, 4, 2, 16, 8, 16, 16, 2, 32, 512), (32, 96), 96, 64, 4, 64, 512, 2 * report.MB
)


@dataclass(frozen=True)
class BenchArguments:
    """What the command line says."""

    output: Path
    overwrite: bool
    runs: int
    threads: int
    only: list[str]
    prompts: list[int] | None
    long: bool
    quick: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark of one kind of machine; there is one kind so far."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"cpu": cpu}
    parser = argparse.ArgumentParser(
        prog="nemotron-h bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=tuple(commands), help="what to measure; COMMAND --help tells its options")
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


def cpu(argv: Sequence[str]) -> int:
    """Measure on this CPU; 0 also where a target is missed, which the table and the JSON tell."""
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
    for path in outputs(arguments.output):
        if path.exists() and not arguments.overwrite:
            raise ValueError(f"--output: {path} is there already; --overwrite replaces it")
    return arguments


def as_list(value: int | list[int]) -> list[int]:
    """The numbers given to an option that takes one or several."""
    return value if isinstance(value, list) else [value]


def outputs(prefix: Path) -> tuple[Path, Path]:
    """The JSON file and the plot."""
    return prefix.with_name(prefix.name + ".json"), prefix.with_name(prefix.name + ".png")


def measure(plan: Plan, arguments: BenchArguments, say: Callable[[str], None]) -> report.Results:
    """The gate, then the parts asked for, in the order of `PARTS`."""
    busy = os.getloadavg()[0]
    if busy > 0.5:
        say(f"the machine is busy (load {busy:.1f}): figures will be noisy")
    both = sides.build_sides(plan.shape)
    results = report.Results(errors=gate.check_agreement(both, plan.shape))
    say("correctness gate passed")
    if "decode" in arguments.only:
        results.decode = measure_decode(plan, both, DECODE_ROUNDS * arguments.runs, say)
    if "prefill" in arguments.only:
        for length in arguments.prompts or plan.prefill_tokens:
            results.prefill.append(measure_prefill(plan, both, length, arguments.runs, say))
            results.errors[f"logits, ours against native, last of {length}"] = check_prefill(results.prefill[-1])
    if "train" in arguments.only:
        results.train = measure_train(plan, both, arguments.runs, say)
    del both  # the processes that follow bring their own weights
    if "train" in arguments.only and memory.can_measure():
        results.train_memory = measure_memory("train", plan, plan.train_tokens, None, arguments.threads, say)
    if "long" in arguments.only and arguments.long and memory.can_measure():
        results.long_tokens = plan.long_tokens
        results.long_memory = measure_memory(
            "prefill", plan, plan.long_tokens, plan.long_limit_bytes, arguments.threads, say
        )
    return results


def measure_decode(plan: Plan, both: sides.Sides, num_runs: int, say: Callable[[str], None]) -> timing.Timing:
    """Single tokens after a prompt; a sample is `decode_steps` of them."""
    jobs = sides.decode_jobs(both, plan.shape, plan.decode_context, plan.decode_steps)
    return timing.time_in_turns("decode", plan.decode_steps, jobs, num_runs, jobs, say)


def measure_prefill(
    plan: Plan, both: sides.Sides, length: int, num_runs: int, say: Callable[[str], None]
) -> timing.Timing:
    """One prompt; warmed up on one no longer than the target's, and beyond it timed once: minutes a round."""
    num_runs = num_runs if length <= plan.target_prefill_tokens else 1
    jobs = sides.prefill_jobs(both, plan.shape, length)
    warm_up = sides.prefill_jobs(both, plan.shape, min(length, plan.target_prefill_tokens))
    return timing.time_in_turns(f"prefill {length}", length, jobs, num_runs, warm_up, say)


def check_prefill(measured: timing.Timing) -> float:
    """The gate again, on what the timed prompt gave; 0 if native could not run it."""
    if measured.last_results.keys() < {"ours", "native"}:
        return 0.0
    error = gate.largest_difference(measured.last_results["ours"], measured.last_results["native"])
    gate.require(f"logits of {measured.name}", error)
    return error


def measure_train(plan: Plan, both: sides.Sides, num_runs: int, say: Callable[[str], None]) -> timing.Timing:
    """Forward and backward of one sequence."""
    jobs = sides.train_jobs(both, plan.shape, plan.train_tokens)
    return timing.time_in_turns(f"train {plan.train_tokens}", plan.train_tokens, jobs, num_runs, jobs, say)


def measure_memory(
    job: str, plan: Plan, length: int, native_limit_bytes: int | None, threads: int, say: Callable[[str], None]
) -> dict[str, memory.Footprint]:
    """Both models, one after the other, each alone in a process; native may be held to a limit."""
    found = {}
    for side, limit in (("native", native_limit_bytes), ("ours", None)):
        found[side] = memory.measure_apart(job, side, plan.shape, length, threads, limit)
        say(f"memory of {job} {length}, {side}: {report.describe(found[side])}")
    return found


def write(arguments: BenchArguments, results: report.Results, document: dict) -> None:
    """JSON and plot, each under a temporary name first."""
    json_path, plot_path = outputs(arguments.output)
    json_path.parent.mkdir(parents=True, exist_ok=True)
    replace(json_path, lambda path: path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8"))
    try:
        from nemotron_h_hf.benchmark.plot import draw
    except ImportError as error:
        say(f"no plot: {error.name} is not installed; pip install 'nemotron-h-hf[plot]'")
        return
    replace(plot_path, lambda path: draw(results, path))


def replace(path: Path, write_to: Callable[[Path], object]) -> None:
    """Write a file beside its place, then move it there whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_to(temporary)
    os.replace(temporary, path)
    say(f"wrote {path}")


def say(line: str) -> None:
    """Progress, apart from the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
