"""One run of the benchmark on a device: its arguments, the parts that can be asked for alone, and the suite of all."""

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..environment import machine, versions
from ..model.configuration_nemotron_h import MAMBA_IMPLEMENTATIONS, NemotronHConfig
from ..units import TOKENS_HELP, tokens
from . import jobs, report, suite, vllm_peer
from .device_gate import check_compiled, check_model, check_slice
from .devices import describe_device, find_device, measure_rates
from .models import PEERS, SIDES, TINY, Side, build_native, build_ours, build_peer, read_config
from .records import Journal, Measurement
from .summary import VERDICTS, table

__all__ = ["PARTS", "DeviceArguments", "add_arguments", "run", "table"]

PARTS = ("decode", "prefill", "throughput", "train", "memory")
VARIANTS = ("eager", "graphs", "compiled", "fp8")
CPU_BUDGET_GB = 4.0
DEFAULT_CONTEXT = {"decode": 1024, "prefill": 65536, "throughput": 65536, "train": 8192, "memory": 65536}
COUNTS = ("layers", "rows", "context", "tokens_out", "steps", "runs", "most_rows", "seconds")


@dataclass(frozen=True)
class DeviceArguments:
    """What the command line says; see `add_arguments`."""

    part: str
    model: str
    random_weights: bool
    layers: int | None
    device: str
    dtype: str | None
    mamba_implementation: str
    sides: list[str]
    variants: list[str]
    rows: list[int]
    context: list[int] | None
    tokens_out: int
    steps: int
    runs: int
    most_rows: int
    whole: bool
    memory_budget: float
    seconds: float
    output: Path
    overwrite: bool

    def check(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ValueError: naming the option.
        """
        for name in COUNTS:
            values = getattr(self, name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and value < 1:
                    raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
        if "fp8" in self.variants and (self.part != "train" or self.sides != ["ours"]):
            raise ValueError("--variants fp8: allowed for train with --sides ours")

    @property
    def checkpoint(self) -> str | None:
        """The folder whose weights are loaded, None for random ones."""
        loaded = Path(self.model).is_dir() and not self.random_weights and self.layers is None
        return self.model if loaded else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every part and of the suite."""
    add = parser.add_argument
    add(
        "--model", "--preset", default="nemotron-h-8b", help=f"a preset, a checkpoint folder, or {TINY} (nemotron-h-8b)"
    )
    add("--random-weights", action="store_true", help="take a checkpoint's shape, not its weights")
    add("--layers", type=int, help="a slice of the depth, with random weights, for small machines")
    add("--device", default="cuda", help="cuda or cpu (cuda)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="(bfloat16 on a GPU, float32 on a CPU)")
    add(
        "--mamba-implementation",
        choices=MAMBA_IMPLEMENTATIONS,
        default="auto",
        help="who computes the Mamba ops (auto)",
    )
    add("--sides", nargs="+", choices=(*SIDES, "vllm"), default=["ours", "native"], help="models (ours native)")
    add("--variants", nargs="+", choices=VARIANTS, default=["eager"], help="decode and train: how they run (eager)")
    add("--rows", nargs="+", type=int, default=[1], help="batch sizes (1)")
    add("--context", nargs="+", type=tokens, help=f"tokens before decoding, or of a prompt or row; {TOKENS_HELP}")
    add("--tokens-out", type=tokens, default=1024, help="throughput: tokens made for each prompt (1024)")
    add("--steps", type=int, default=32, help="decode: tokens timed (32)")
    add("--runs", type=int, default=5, help="prefill and train: rounds after the warm-up (5)")
    add("--most-rows", type=int, default=512, help="throughput: rows that are enough (512)")
    add("--whole", action="store_true", help="prefill: also in one piece; memory: compute all of the prompt")
    add("--memory-budget", type=float, default=CPU_BUDGET_GB, help="GB a job may take beyond the models, on a CPU (4)")
    add("--seconds", type=float, default=suite.SECONDS, help="suite: begin nothing that would end later (600)")
    add("--output", type=Path, help="files to write, without ending (bench_PART)")
    add("--overwrite", action="store_true", help="replace files that are there")


def run(
    arguments: DeviceArguments, command: str, path: Path, say: Callable[[str], None]
) -> tuple[Journal, list[report.Target]]:
    """Measure; what was found, and of the suite the targets.

    Raises:
        ValueError: without the device, for unknown models, and for results that do not agree.
    """
    device = find_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    whole = read_config(arguments.model, None)
    config = whole if arguments.layers is None else read_config(arguments.model, arguments.layers)
    config.mamba_implementation = arguments.mamba_implementation
    sizes = suite.SMALL if device.type == "cpu" else suite.Sizes()
    is_suite = arguments.part == suite.NAME
    head = {
        "command": command,
        "machine": machine(),
        "device": describe_device(device),
        "versions": versions(),
        "settings": {**asdict(arguments), "output": str(arguments.output), "dtype": str(dtype).removeprefix("torch.")},
        "pattern": config.hybrid_override_pattern,
    }
    if is_suite:
        head["sizes"] = asdict(sizes)
        head["targets_are_for"] = "the 8B in bfloat16 on one H200"

    def verdicts(journal: Journal) -> list[dict]:
        return [asdict(t) | {"verdict": VERDICTS[t.passed]} for t in suite.targets(journal, sizes)] if is_suite else []

    journal = Journal(path, head, verdicts)
    rates = measure_rates(device, dtype)
    journal.note("rates", asdict(rates))
    budget = int(arguments.memory_budget * report.GB) if device.type == "cpu" else None
    bench = jobs.Bench(device, dtype, rates, arguments.runs, budget, say)
    if is_suite:
        compiled = "compiled" in arguments.variants or device.type == "cuda"
        suite.Suite(bench, config, whole, sizes, journal, compiled, arguments.seconds).run()
        return journal, suite.targets(journal, sizes)
    for measurement in measure(arguments, bench, config, whole, journal):
        journal.add(measurement)
    journal.finished = True
    journal.write()
    return journal, []


def measure(
    arguments: DeviceArguments, bench: jobs.Bench, config: NemotronHConfig, whole: NemotronHConfig, journal: Journal
) -> Iterator[Measurement]:
    """The measurements of one part, each as soon as it is done; only models of one kind are held at a time."""
    if {"ours", "native"} & set(arguments.sides):
        errors = check_slice(config, bench.device)
        ours = build_ours(config, bench.dtype, bench.device, arguments.checkpoint)
        native = build_native(ours)
        errors |= check_model(ours, native)
        journal.note("correctness", errors)
        bench.say("correctness gate passed")
        for side in (ours, native):
            if side.name in arguments.sides:
                yield from measure_side(arguments, bench, side, journal)
        del ours, native, side
    for name in (name for name in arguments.sides if name in PEERS):
        gc.collect()
        yield from measure_side(arguments, bench, build_peer(name, config, whole, bench.dtype, bench.device), journal)
    if "vllm" in arguments.sides:
        yield from measure_vllm(arguments, bench, config)


def measure_side(arguments: DeviceArguments, bench: jobs.Bench, side: Side, journal: Journal) -> Iterator[Measurement]:
    """One part of one model, at every size asked for."""
    part, steps = arguments.part, arguments.steps
    for context in arguments.context or [DEFAULT_CONTEXT[part]]:
        if part == "throughput":
            yield jobs.throughput(bench, side, context, arguments.tokens_out, steps, arguments.most_rows)
        elif part == "memory":
            yield jobs.memory(bench, side, context, arguments.whole)
        elif part == "train":
            for variant in sorted(arguments.variants, key=VARIANTS.index):  # FP8 changes the model, so it comes last
                yield jobs.train(bench, side, context, compiled=variant in ("compiled", "fp8"), fp8=variant == "fp8")
        for rows in arguments.rows if part in ("decode", "prefill") else ():
            bench.say(f"{part}, {side.name}: {rows} x {context:,}")
            if part == "prefill":
                for in_one_piece in (False, True)[: 1 + arguments.whole]:
                    yield jobs.prefill_prompts(bench, side, rows, context, in_one_piece)
                continue
            for variant in arguments.variants:
                if variant == "compiled":
                    errors = check_compiled(side, rows, jobs.decode_room(context, steps))
                    journal.note("correctness", {**journal.head.get("correctness", {}), **errors})
                yield jobs.decode(bench, side, rows, context, steps, variant)


def measure_vllm(arguments: DeviceArguments, bench: jobs.Bench, config: NemotronHConfig) -> Iterator[Measurement]:
    """Throughput of vLLM, where it is installed.

    Raises:
        ValueError: where it is not, or for another part.
    """
    if arguments.part != "throughput" or not vllm_peer.installed():
        raise ValueError("--sides vllm: allowed for throughput, where vLLM is installed (pip install vllm)")
    for context in arguments.context or [DEFAULT_CONTEXT["throughput"]]:
        yield vllm_peer.throughput(config, bench.dtype, arguments.most_rows, context, arguments.tokens_out)
