"""`nemotron-h bench cpu`: ours, transformers' own with the same weights, the Linear layers alone and llama.cpp, in turns.

In fp32, and decoding in bf16 and int8 too. Nothing is timed before the gate is passed.
"""

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from ..environment import can_measure
from ..model.configuration_nemotron_h import NemotronHConfig
from . import jobs, linears, llama_cpp_peer
from .devices import give_memory_back, measure_rates
from .gate import check_int8, check_model, check_slice, random_ids
from .memory import GB, Footprint, footprint, measure_apart
from .models import Side, build_native, build_ours
from .records import Journal, Measurement, Target, fastest, ratio
from .turns import Bench, Job, take_turns
from .work import costs_of

NAME = "cpu"
PARTS = ("decode", "int8", "bf16", "threads", "prefill", "train", "memory", "long")
DECODE_ROUNDS = 3  # times those of the rest: a sample lasts under a second, and one busy moment would colour it
WARM_UP_TOKENS = 32
INT8, INT8_HEAD = "int8, lm_head in fp32", "int8, lm_head as well"
LIKE_A_PEER = {"q8_0": f"int8: {INT8_HEAD}", "bf16": "bf16: bfloat16"}
"""llama.cpp's kind of file -> our weights in the same precision."""
QUIET, BUSY = "quiet", "one process spinning"


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens; the defaults are what the targets are set for."""

    prompts: tuple[int, ...] = (256, 1024, 4096, 16384)
    target_prompt: int = 4096
    context: int = 1024
    steps: int = 16
    train: int = 2048
    long: int = 65536
    long_limit_bytes: int = 2 * GB  # what transformers' model is given beyond the weights
    short_trains: tuple[int, ...] = (512, 1024)


QUICK = Sizes((32, 96), 96, 64, 4, 64, 512, 2 * 10**6, (32,))


class Suite:
    """The parts of one run, with the models that they share.

    Args:
        gguf: files of the same weights for llama.cpp.
    """

    def __init__(self, bench: Bench, config: NemotronHConfig, sizes: Sizes, journal: Journal, gguf: list[Path]) -> None:
        self.bench, self.config, self.sizes, self.journal, self.gguf = bench, config, sizes, journal, gguf

    def run(self, parts: list[str]) -> None:
        """The gate, then the parts asked for, in the order of `PARTS`.

        Raises:
            ValueError: for results that do not agree; nothing is timed then.
        """
        if (busy := os.getloadavg()[0]) > 0.5:
            self.bench.say(f"the machine is busy (load {busy:.1f}): figures will be noisy")
        self.journal.add_errors(check_slice(self.config, self.bench.device))
        self.ours = build_ours(self.config, torch.float32, self.bench.device)
        self.native = build_native(self.ours)
        self.journal.add_errors(check_model(self.ours, self.native))
        self.bench.say("correctness gate passed")
        timed = {"decode": self.decode, "int8": self.int8, "bf16": self.bf16, "threads": self.threads,
                 "prefill": self.prefill, "train": self.train}  # fmt: skip
        for measure in (measure for part, measure in timed.items() if part in parts):
            measure()
        del self.ours, self.native  # the processes that follow bring their own weights
        give_memory_back(self.bench.device)
        apart = {"memory": self.memory, "long": self.long} if can_measure() else {}
        for measure in (measure for part, measure in apart.items() if part in parts):
            measure()
        self.journal.finish()

    def keep(self, *turns: Job, rounds: int | None = None) -> None:
        for found in take_turns(self.bench, turns, rounds):
            self.journal.add(found)

    def decode_job(self, side: Side, variant: str, **changes: object) -> Job:
        """Of one row; `variant` is what the table says, the steps are eager."""
        job = jobs.decode(replace(self.bench, **changes), side, 1, self.sizes.context, self.sizes.steps, "eager")
        job.found.variant = variant
        return job

    @property
    def decode_rounds(self) -> int:
        return DECODE_ROUNDS * self.bench.num_runs

    def decode(self) -> None:
        context, steps = self.sizes.context, self.sizes.steps
        floors = [linears.linear_steps(self.bench, self.ours, context, steps, by_torch) for by_torch in (False, True)]
        sides = [self.decode_job(side, "float32") for side in (self.ours, self.native)]
        peers = [llama_cpp_peer.decode(self.bench, self.ours, path, context, steps) for path in self.gguf]
        self.keep(*floors, *sides, *peers, rounds=self.decode_rounds)

    def int8(self) -> None:
        """Weights in fp32 and int8, as torchao multiplies them and as ours does."""
        if missing := [package for package in ("torchao", "numba") if find_spec(package) is None]:
            self.bench.say(f"int8 is left out: pip install {' '.join(missing)}")
            return
        sides = int8_sides(self.ours)
        self.journal.add_errors(check_int8(sides[INT8], sides["torchao"]))
        self.keep(*(self.decode_job(side, f"int8: {name}") for name, side in sides.items()), rounds=self.decode_rounds)

    def bf16(self) -> None:
        """Weights in fp32 and bf16, of ours and of transformers' own: decoding, and a prompt."""
        ours = copy.deepcopy(self.ours.model).to(torch.bfloat16)
        sides = [replace(self.ours, model=ours, costs=costs_of(self.config, "bfloat16"))]
        sides.append(build_native(sides[0]))
        rates = measure_rates(self.bench.device, torch.bfloat16)
        self.journal.note("rates_bfloat16", asdict(rates))
        bench = replace(self.bench, dtype=torch.bfloat16, rates=rates)
        turns = [self.decode_job(side, "bf16: float32") for side in (self.ours, self.native)]
        turns += [self.decode_job(side, "bf16: bfloat16", dtype=bench.dtype, rates=rates) for side in sides]
        self.keep(*turns, rounds=self.decode_rounds)
        prompts = [jobs.prefill_prompts(bench, side, 1, self.sizes.prompts[1]) for side in sides]
        for job in prompts:
            job.found.variant = "bf16: bfloat16"
        self.keep(*prompts)

    def threads(self) -> None:
        """All threads, one, and PyTorch's operations without Numba, on a quiet machine and with another process at work."""
        for condition in (QUIET, BUSY):
            turns = []
            for name, count, implementation in (
                ("all threads", torch.get_num_threads(), "auto"), ("one thread", 1, "auto"),
                ("PyTorch's operations", torch.get_num_threads(), "torch"),
            ):  # fmt: skip
                job = self.decode_job(self.ours, f"threads: {name}, {condition}")
                job.sample = _with_threads(job.sample, count, self.ours, implementation)
                turns.append(job)
            with spinning(condition == BUSY):
                self.keep(*turns, rounds=self.decode_rounds)

    def prefill(self) -> None:
        """Beyond the prompt whose speed is promised, one round: it takes minutes."""
        for length in self.sizes.prompts:
            turns = [linears.linear_prompt(self.bench, self.ours, length)]
            turns += [jobs.prefill_prompts(self.bench, side, 1, length) for side in (self.ours, self.native)]
            turns += [llama_cpp_peer.prompt(self.bench, self.ours, path, length) for path in self.gguf]
            self.keep(*turns, rounds=None if length <= self.sizes.target_prompt else 1)

    def train(self) -> None:
        sides = (self.ours, self.native)
        for length in (*self.sizes.short_trains, self.sizes.train):
            turns = [linears.linear_training(self.bench, self.ours, length)]
            self.keep(*turns, *(jobs.train(self.bench, side, length, with_step=False) for side in sides))
        for side in sides:
            side.model.eval()

    def memory(self) -> None:
        """Of a training step, each side in its own process."""
        self.apart("train", self.sizes.train, None)

    def long(self) -> None:
        """Of a long prompt; transformers' own is held to a limit, which it exceeds."""
        self.apart("prefill", self.sizes.long, self.sizes.long_limit_bytes)

    def apart(self, job: str, length: int, native_limit_bytes: int | None) -> None:
        for side, limit in (("native", native_limit_bytes), ("ours", None)):
            taken = measure_apart(measure_job, job, side, self.config.to_dict(), length, torch.get_num_threads(), limit)
            found = Measurement("memory", side, job, 1, length, peak_bytes=taken.extra_bytes, failure=taken.failure)
            found.seconds = [taken.seconds] if taken.failure is None else []
            if taken.at_least_bytes is not None:
                found.figures["at_least_bytes"] = taken.at_least_bytes
            self.journal.add(found)
            self.bench.say(f"memory of {job} {length:,}, {side}: {found.failure or f'{found.peak_bytes / GB:.3f} GB'}")


def targets(journal: Journal, sizes: Sizes) -> list[Target]:
    """What one run says about each promise, None where it does not."""
    at_target, trained = {"context": sizes.target_prompt}, {"context": sizes.train}

    def over(part: str, slow: tuple[str, str | None], fast: tuple[str, str | None], **values: int) -> float | None:
        return ratio(fastest(journal.find(part, *slow, **values)), fastest(journal.find(part, *fast, **values)))

    ours, native, alone = ("ours", None), ("native", None), (linears.SIDE, linears.AS_CALLED)
    plain = fastest(journal.find("decode", "ours", "float32"))
    memory = {side: next(journal.find("memory", side, "train"), None) for side in ("ours", "native")}
    long = next(journal.find("memory", "ours", "prefill"), None)
    share = all(memory.values()) and memory["ours"].peak_bytes / memory["native"].peak_bytes
    threads = [
        over("decode", ("ours", f"threads: all threads, {condition}"), ("ours", f"threads: {other}, {condition}"))
        for condition in (QUIET, BUSY) for other in ("one thread", "PyTorch's operations")
    ]  # fmt: skip
    found = [
        Target("decode: time over reading weights and cache once", plain and 1 / plain.share_of_floor, 1.10),
        Target("decode: time over the Linear layers'", over("decode", ("ours", "float32"), alone), 1.25),
        Target("decode, every Linear in int8: times fp32's speed",
               over("decode", ("ours", "int8: float32"), ("ours", f"int8: {INT8_HEAD}")), 1.7, True),
        Target("decode: time over the best of one thread and PyTorch's operations, quiet or busy",
               None if None in threads else max(threads), 1.0),
        Target(f"prefill {sizes.target_prompt}: time over the Linear layers'",
               over("prefill", ours, alone, **at_target), 1.2),
        Target(f"prefill {sizes.target_prompt}: times native's speed", over("prefill", native, ours, **at_target), 2.0, True),
        Target(f"training step, {sizes.train}: times native's speed", over("train", native, ours, **trained), 2.0, True),
        *(
            Target(f"training step, {length}: times native's speed", over("train", native, ours, context=length), 1.5, True)
            for length in sizes.short_trains
        ),
        Target(f"training step, {sizes.train}: time over the Linear layers'", over("train", ours, alone, **trained), 1.15),
        Target("training step: extra peak memory over native's", share or None, 0.45),
        Target(f"prefill {sizes.long}: GB beyond the weights", long and long.peak_bytes / GB, 2.0),
    ]  # fmt: skip
    for peer in dict.fromkeys(m.variant for m in journal.measurements if m.side == llama_cpp_peer.SIDE):
        slow, fast = (llama_cpp_peer.SIDE, peer), ("ours", LIKE_A_PEER.get(peer.lower(), "float32"))
        found.append(Target(f"decode: times llama.cpp's speed ({peer})", over("decode", slow, fast), 1.0, True))
    return [target for target in found if target.value is not None]


def int8_sides(ours: Side) -> dict[str, Side]:
    """The model, and its copies with int8 weights: as torchao multiplies them, as ours does, lm_head in fp32 and not."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised(chosen: Callable[[nn.Module, str], bool]) -> Side:
        model = copy.deepcopy(ours.model)
        linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and chosen(m, name)]
        saved = sum(
            3 * m.weight.numel() - 5 * m.out_features for m in linears
        )  # a byte for four; scale, zero point of a row
        quantize_(model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and chosen(m, name))
        costs = replace(
            ours.costs, step_bytes=ours.costs.step_bytes - saved, weight_bytes=ours.costs.weight_bytes - saved
        )
        return replace(ours, model=model, costs=costs)

    stack = quantised(lambda _, name: name != "lm_head")
    by_torchao = replace(stack, model=copy.deepcopy(stack.model))
    for module in by_torchao.model.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.register_forward_hook(lambda *_: None)  # called as a module, it multiplies as torchao does
    return {"float32": ours, "torchao": by_torchao, INT8: stack, INT8_HEAD: quantised(lambda *_: True)}


def _with_threads(sample, count: int, side: Side, implementation: str):
    """The sample, taken with so many threads and these operations."""

    def taken() -> list[float]:
        before, chosen = torch.get_num_threads(), side.model.config.mamba_implementation
        torch.set_num_threads(count)
        side.model.set_mamba_implementation(implementation)
        try:
            return sample()
        finally:
            torch.set_num_threads(before)
            side.model.set_mamba_implementation(chosen)

    return taken


@contextlib.contextmanager
def spinning(busy: bool) -> Iterator[None]:
    """Another process that takes one core meanwhile."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_job(job: str, side: str, fields: dict, length: int, threads: int, limit_bytes: int | None) -> Footprint:
    """Memory of one job beyond the weights, in the process that is there for it alone.

    Args:
        job: "train" or "prefill", over `length` tokens.
        limit_bytes: what it may allocate beyond the weights; None for what the machine has.
    """
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    ours = build_ours(NemotronHConfig(**fields), torch.float32, torch.device("cpu"))
    model = ours.model if side == "ours" else build_native(ours).model
    del ours
    work = {"train": train_step, "prefill": read_prompt}[job]
    work(model, WARM_UP_TOKENS)  # loads what is loaded on first use
    model.zero_grad(set_to_none=True)
    return footprint(lambda: work(model, length), limit_bytes)


def train_step(model: nn.Module, length: int) -> None:
    """Gradients of one sequence."""
    model.train().zero_grad(set_to_none=True)
    jobs.accumulate_gradients(model, model, random_ids(model, 1, length))


@torch.no_grad()
def read_prompt(model: nn.Module, length: int) -> object:
    """Its cache, and the logits of its last token."""
    return model.eval()(random_ids(model, 1, length), use_cache=True, logits_to_keep=1)
