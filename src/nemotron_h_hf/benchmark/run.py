"""One run of the benchmark: its arguments, the parts that can be asked for alone, and the suites of all."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..command_line import option
from ..environment import machine, versions
from ..model.configuration_checks import MAMBA_IMPLEMENTATIONS
from ..model.configuration_nemotron_h import NemotronHConfig
from ..units import TOKENS_HELP, tokens
from . import cpu_suite, gpu_suite, jobs, llama_cpp_peer, vllm_peer
from .devices import describe_device, find_device, measure_rates
from .gate import check_compiled, check_model, check_slice
from .memory import GB
from .models import PEERS, SHAPES, SIDES, SMALL, TINY, Side, build_native, build_ours, build_peer, read_config
from .records import Journal, Measurement
from .turns import Bench, Job, take_turns

PARTS = ("decode", "prefill", "throughput", "train", "memory")
VARIANTS = ("eager", "graphs", "compiled", "fp8")
CPU_BUDGET_GB = 4.0
DEFAULT_CONTEXT = {"decode": 1024, "prefill": 65536, "throughput": 65536, "train": 8192, "memory": 65536}
COUNTS = ("layers", "rows", "context", "tokens_out", "steps", "runs", "most_rows", "seconds", "threads")


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    part: str  # or a suite
    model: str | None = option(
        None, f"preset, checkpoint folder, {' or '.join(SHAPES)} (nemotron-h-8b; cpu: {SMALL})", "--model", "--preset"
    )
    random_weights: bool = option(False, "take a checkpoint's shape, not its weights")
    layers: int | None = option(None, "a slice of the depth, with random weights, for small machines")
    device: str | None = option(None, "cuda or cpu (cuda; cpu: cpu)")
    dtype: str | None = option(
        None, "(bfloat16 on a GPU, float32 on a CPU)", choices=("bfloat16", "float16", "float32")
    )
    threads: int = option(torch.get_num_threads(), "of PyTorch, on a CPU (its own number)")
    mamba_implementation: str = option("auto", "who computes the Mamba ops (auto)", choices=MAMBA_IMPLEMENTATIONS)
    sides: list[str] = option(["ours", "native"], "models (ours native)", nargs="+", choices=(*SIDES, "vllm"))
    variants: list[str] = option(["eager"], "decode and train: how they run (eager)", nargs="+", choices=VARIANTS)
    rows: list[int] = option([1], "batch sizes (1)", nargs="+")
    context: list[int] | None = option(
        None, f"tokens before decoding, or of a prompt or row; {TOKENS_HELP}", nargs="+", type=tokens
    )
    tokens_out: int = option(1024, "throughput: tokens made for each prompt (1024)", type=tokens)
    steps: int = option(32, "decode: tokens timed (32)")
    runs: int = option(5, "rounds after the warm-up (5; cpu: decoding takes 3 times as many)")
    most_rows: int = option(512, "throughput: rows that are enough (512)")
    whole: bool = option(False, "prefill: also in one piece; memory: compute all of the prompt")
    memory_budget: float = option(CPU_BUDGET_GB, "GB a job may take beyond the models, on a CPU (4)")
    seconds: float = option(gpu_suite.SECONDS, "GPU suite: begin nothing that would end later (600)")
    only: list[str] = option(list(cpu_suite.PARTS), "cpu: parts to measure (all)", nargs="+", choices=cpu_suite.PARTS)
    quick: bool = option(False, "cpu: a tiny model, to see that everything runs; not its speed")
    gguf: list[Path] = option([], "cpu: files of the same weights, for llama.cpp", nargs="+")
    output: Path = option(None, "files to write, without ending (bench_PART)")
    overwrite: bool = option(False, "replace files that are there")

    def check(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ValueError: naming the option.
        """
        for name in COUNTS:
            values = getattr(self, name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and value < 1:
                    raise ValueError(f"--{name.replace('_', '-')}={value}: allowed is 1 or more")
        if "fp8" in self.variants and (self.part != "train" or self.sides != ["ours"]):
            raise ValueError("--variants fp8: allowed for train with --sides ours")
        llama_cpp_peer.check(self.gguf)

    @property
    def checkpoint(self) -> str | None:
        """The folder whose weights are loaded, None for random ones."""
        loaded = Path(self.model_name).is_dir() and not self.random_weights and self.layers is None
        return self.model_name if loaded else None

    @property
    def on_cpu(self) -> bool:
        return self.part == cpu_suite.NAME

    @property
    def model_name(self) -> str:
        return self.model or (TINY if self.quick else SMALL if self.on_cpu else "nemotron-h-8b")


def run(arguments: Arguments, command: str, path: Path, say: Callable[[str], None]) -> Journal:
    """Measure; what was found.

    Raises:
        ValueError: without the device, for unknown models, and for results that do not agree.
    """
    device = find_device(arguments.device or ("cpu" if arguments.on_cpu else "cuda"))
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    threads_before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    try:
        return _run_on(arguments, device, dtype, command, path, say)
    finally:
        torch.set_num_threads(threads_before)


def _run_on(
    arguments: Arguments, device: torch.device, dtype: torch.dtype, command: str, path: Path, say: Callable
) -> Journal:
    whole = read_config(arguments.model_name, None)
    config = whole if arguments.layers is None else read_config(arguments.model_name, arguments.layers)
    config.mamba_implementation = arguments.mamba_implementation
    journal = Journal(path, _head(arguments, device, dtype, config, command))
    rates = measure_rates(device, dtype)
    journal.head["rates"] = asdict(rates)
    budget = int(arguments.memory_budget * GB) if device.type == "cpu" and not arguments.on_cpu else None
    bench = Bench(device, dtype, rates, arguments.runs, budget, say)
    if arguments.on_cpu:
        sizes = cpu_suite.QUICK if arguments.quick else cpu_suite.Sizes()
        _promise(journal, sizes, "the 189M model in fp32 on a CPU", cpu_suite.targets)
        cpu_suite.Suite(bench, config, sizes, journal, arguments.gguf).run(arguments.only)
    elif arguments.part == gpu_suite.NAME:
        sizes = gpu_suite.SMALL if device.type == "cpu" else gpu_suite.Sizes()
        _promise(journal, sizes, "the 8B in bfloat16 on one H200", gpu_suite.targets)
        compiled = "compiled" in arguments.variants or device.type == "cuda"
        gpu_suite.Suite(bench, config, whole, sizes, journal, compiled, arguments.seconds).run()
    else:
        for measurement in measure(arguments, bench, config, whole, journal):
            journal.add(measurement)
        journal.finish()
    return journal


def _head(
    arguments: Arguments, device: torch.device, dtype: torch.dtype, config: NemotronHConfig, command: str
) -> dict:
    """What is known before measuring."""
    settings = {**asdict(arguments), "output": str(arguments.output), "gguf": [str(path) for path in arguments.gguf]}
    return {
        "command": command,
        "machine": machine(),
        "device": describe_device(device),
        "versions": versions(),
        "settings": {**settings, "model": arguments.model_name, "dtype": str(dtype).removeprefix("torch.")},
        "pattern": config.hybrid_override_pattern,
    }


def _promise(journal: Journal, sizes: object, whose: str, targets: Callable) -> None:
    """The targets of a suite, for the sizes of this run."""
    journal.head |= {"sizes": asdict(sizes), "targets_are_for": whose}
    journal.targets = lambda journal: targets(journal, sizes)


def measure(
    arguments: Arguments, bench: Bench, config: NemotronHConfig, whole: NemotronHConfig, journal: Journal
) -> Iterator[Measurement]:
    """The measurements of one part, each as soon as it is done; ours and native share weights and are timed in turns."""
    shared = [name for name in ("ours", "native") if name in arguments.sides]
    if shared:
        errors = check_slice(config, bench.device)
        ours = build_ours(config, bench.dtype, bench.device, arguments.checkpoint)
        native = build_native(ours)
        journal.add_errors(errors | check_model(ours, native))
        bench.say("correctness gate passed")
        yield from measure_sides(arguments, bench, [{"ours": ours, "native": native}[n] for n in shared], journal)
        del ours, native
    for name in (name for name in arguments.sides if name in PEERS):
        gc.collect()
        peer = build_peer(name, config, whole, bench.dtype, bench.device)
        yield from measure_sides(arguments, bench, [peer], journal)
        del peer
    if "vllm" in arguments.sides:
        yield from measure_vllm(arguments, bench, config)


def measure_sides(arguments: Arguments, bench: Bench, sides: list[Side], journal: Journal) -> Iterator[Measurement]:
    """One part of models, at every size asked for; what can be timed in turns is."""
    part, steps = arguments.part, arguments.steps
    for context in arguments.context or [DEFAULT_CONTEXT[part]]:
        if part == "throughput":
            for side in sides:
                yield jobs.throughput(bench, side, context, arguments.tokens_out, steps, arguments.most_rows)
        elif part == "memory":
            for side in sides:
                yield jobs.memory(bench, side, context, arguments.whole)
        else:
            for turns in turns_of(arguments, bench, sides, context, journal):
                yield from take_turns(bench, turns)


def turns_of(
    arguments: Arguments, bench: Bench, sides: list[Side], context: int, journal: Journal
) -> Iterator[list[Job]]:
    """What is timed together: one variant of all sides."""
    if arguments.part == "train":
        for variant in sorted(arguments.variants, key=VARIANTS.index):  # FP8 changes the model, so it comes last
            for side in sides:  # not in turns: each step changes the weights that they share
                yield [jobs.train(bench, side, context, variant in ("compiled", "fp8"), fp8=variant == "fp8")]
        return
    for rows in arguments.rows:
        if arguments.part == "prefill":
            for whole in (False, True)[: 1 + arguments.whole]:
                yield [jobs.prefill_prompts(bench, side, rows, context, whole) for side in sides]
            continue
        for variant in arguments.variants:
            if variant == "compiled":
                for side in sides:
                    journal.add_errors(check_compiled(side, rows, jobs.decode_room(context, arguments.steps)))
            yield [jobs.decode(bench, side, rows, context, arguments.steps, variant) for side in sides]


def measure_vllm(arguments: Arguments, bench: Bench, config: NemotronHConfig) -> Iterator[Measurement]:
    """Throughput of vLLM, where it is installed.

    Raises:
        ValueError: where it is not, or for another part.
    """
    if arguments.part != "throughput" or not vllm_peer.installed():
        raise ValueError("--sides vllm: allowed for throughput, where vLLM is installed (pip install vllm)")
    for context in arguments.context or [DEFAULT_CONTEXT["throughput"]]:
        yield vllm_peer.throughput(config, bench.dtype, arguments.most_rows, context, arguments.tokens_out)
