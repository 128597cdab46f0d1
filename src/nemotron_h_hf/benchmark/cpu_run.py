"""What `nemotron-h bench cpu` measures: the parts, their sizes, and their order.

Lengths are in tokens. The sides are measured alternately, and nothing is timed before the gate is passed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from . import gate, memory, report, sides, timing

PARTS = ("decode", "int8", "prefill", "train", "long")
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
    if "int8" in arguments.only:
        results.int8 = measure_int8(plan, both, DECODE_ROUNDS * arguments.runs, results.errors, say)
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


def measure_int8(
    plan: Plan, both: sides.Sides, num_runs: int, errors: dict[str, float], say: Callable[[str], None]
) -> timing.Timing | None:
    """As `measure_decode`, for weights in fp32 and int8; the gate asks for torchao's logits. None without
    torchao or Numba."""
    missing = [package for package in ("torchao", "numba") if find_spec(package) is None]
    if missing:
        say(f"int8 is left out: pip install {' '.join(missing)}")
        return None
    models = sides.int8_models(both.ours)
    errors["logits, int8.py against torchao"] = gate.check_int8(models, plan.shape)
    ids = sides.random_tokens(plan.shape, plan.decode_context)
    jobs = {side: sides.decoder(model, ids, plan.decode_steps) for side, model in models.items()}
    return timing.time_in_turns("decode, int8", plan.decode_steps, jobs, num_runs, jobs, say)


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
