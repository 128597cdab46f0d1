"""Everything that the targets need in one run of ten minutes on one H200: `nemotron-h bench --suite gpu-10min`.

Smaller jobs come first, each measurement is on disk before the next begins, and a job that would no longer fit into the
time is skipped and says so. The targets are set for the 8B in bfloat16 on one H200; the same steps run with small sizes
anywhere, where the verdicts mean nothing.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..model.configuration_nemotron_h import NemotronHConfig
from . import jobs, vllm_peer
from .devices import give_memory_back
from .gate import check_compiled, check_model, check_slice
from .models import Side, build_native, build_ours, build_peer, depth_slice
from .records import Journal, Measurement, Target, fastest, ratio
from .turns import Bench, Job, take_turns

NAME = "gpu-10min"
SECONDS = 600


@dataclass(frozen=True)
class Sizes:
    """Rows and tokens of the targets."""

    steps: int = 32
    small_context: int = 1024
    large_rows: int = 64
    large_context: int = 16384
    prompt: int = 65536
    short_prompt: int = 8192
    tokens_out: int = 1024
    most_rows: int = 512
    train_layers: int = 4
    train_tokens: int = 8192
    memory_context: int = 1_000_000


SMALL = Sizes(4, 32, 3, 64, 128, 64, 8, 4, 4, 64, 512)


@dataclass(frozen=True)
class Step:
    """One job of the suite, and about how many seconds it takes on an H200 (estimates, unmeasured)."""

    name: str
    seconds: float
    run: Callable[[], object]


class Suite:
    """The steps of one run, with the models that they share.

    Args:
        config, whole: of the models, and of the whole one if that is a slice of it.
        compiled: measure compiled steps too; they cost most of the time of a small run.
        seconds: after which no step is begun that would not end in time.
    """

    def __init__(
        self,
        bench: Bench,
        config: NemotronHConfig,
        whole: NemotronHConfig,
        sizes: Sizes,
        journal: Journal,
        compiled: bool,
        seconds: float = SECONDS,
    ) -> None:
        self.bench, self.config, self.whole, self.sizes, self.journal = bench, config, whole, sizes, journal
        self.compiled, self.seconds = compiled, seconds
        self.sides: dict[str, Side] = {}
        self.passed: set[str] = set()  # the gates passed since the models were built

    def run(self) -> None:
        """All steps that there is time for. A wrong answer ends the run; any other failure is noted, and the next begins."""
        start, skipped = time.monotonic(), []
        for step in self.steps():
            left = self.seconds - (time.monotonic() - start)
            if left < step.seconds:
                skipped.append(f"{step.name}: {left:.0f} s left, about {step.seconds:.0f} needed")
                self.journal.note("skipped", skipped)
                continue
            self.bench.say(f"{step.name} ({left:.0f} s left)")
            try:
                step.run()
            except ValueError:  # the gate's
                raise
            except Exception as error:  # a peer that breaks must not take the minutes of all others with it
                skipped.append(
                    f"{step.name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
                self.journal.note("skipped", skipped)
                self.bench.say(traceback.format_exc())
        self.journal.finish()

    def steps(self) -> Iterator[Step]:
        """In order; those that share a model stand together, as there is room for few."""
        yield Step("gate: a slice in fp32 against transformers' own", 5, self.gate_slice)
        yield from self.training_steps()
        yield Step("build ours and transformers' own", 10, self.build)
        yield Step("gate: the model that is timed", 5, self.gate_model)
        yield from self.decode_steps()
        yield from self.prefill_steps()
        yield Step("throughput, ours", 45, lambda: self.throughput("ours"))
        yield Step("a long context", 20, self.long_context)
        for name, seconds in (("qwen2", 50), ("llama", 50)):
            yield Step(f"build {name}", 10, lambda name=name: self.build_peer(name))
            yield Step(f"decode, {name}", 5, lambda name=name: self.decode(name, 1, self.sizes.small_context, "eager"))
            yield Step(f"throughput, {name}", seconds, lambda name=name: self.throughput(name))
        if vllm_peer.installed():
            yield Step("throughput, vLLM", 120, self.vllm)
        if self.compiled:
            yield from self.compiled_steps()

    def training_steps(self) -> Iterator[Step]:
        yield Step("training step", 15, lambda: self.train(compiled=False, fp8=False))
        if self.compiled:
            yield Step("training step, compiled", 40, lambda: self.train(compiled=True, fp8=False))
            yield Step("training step, FP8", 50, lambda: self.train(compiled=True, fp8=True))

    def compiled_steps(self) -> Iterator[Step]:
        context = self.sizes.small_context
        yield Step("build ours and transformers' own again", 10, self.build)
        for name in ("ours", "native"):
            yield Step(f"gate: compiled steps, {name}", 90, lambda name=name: self.gate_compiled(name))
            yield Step(f"decode compiled, {name}", 10, lambda name=name: self.decode(name, 1, context, "compiled"))

    def decode_steps(self) -> Iterator[Step]:
        sizes, graphs = self.sizes, self.bench.device.type == "cuda"
        yield Step("decode, ours", 5, lambda: self.decode("ours", 1, sizes.small_context, "eager"))
        yield Step("decode, native", 10, lambda: self.decode("native", 1, sizes.small_context, "eager"))
        if graphs:
            yield Step("decode from graphs, ours", 5, lambda: self.decode("ours", 1, sizes.small_context, "graphs"))
        variant = "graphs" if graphs else "eager"
        batch = lambda: self.decode("ours", sizes.large_rows, sizes.large_context, variant)  # noqa: E731
        yield Step("decode a batch, ours", 15, batch)

    def prefill_steps(self) -> Iterator[Step]:
        for length, whole, seconds in (
            (self.sizes.short_prompt, False, 5),
            (self.sizes.prompt, False, 20),
            (self.sizes.prompt, True, 20),
        ):
            name = f"prefill {length:,} {'whole' if whole else 'in parts'}"
            yield Step(name, seconds, lambda length=length, whole=whole: self.prefill(length, whole))

    def gate_slice(self) -> None:
        self.note_passed("slice", check_slice(self.config, self.bench.device))

    def build(self) -> None:
        self.sides.clear()
        self.passed &= {"slice"}
        give_memory_back(self.bench.device)
        self.sides["ours"] = build_ours(self.config, self.bench.dtype, self.bench.device)
        self.sides["native"] = build_native(self.sides["ours"])

    def build_peer(self, name: str) -> None:
        self.sides.clear()
        torch.compiler.reset()  # graphs hold weights
        give_memory_back(self.bench.device)
        self.sides[name] = build_peer(name, self.config, self.whole, self.bench.dtype, self.bench.device)

    def gate_model(self) -> None:
        self.note_passed("model", check_model(self.sides["ours"], self.sides["native"]))

    def gate_compiled(self, name: str) -> None:
        room = jobs.decode_room(self.sizes.small_context, self.sizes.steps)
        self.note_passed(f"compiled {name}", check_compiled(self.sides[name], 1, room))

    def note_passed(self, gate: str, errors: dict[str, float]) -> None:
        self.passed.add(gate)
        self.journal.add_errors(errors)

    def require_gate(self, gate: str) -> None:
        if gate not in self.passed:
            raise RuntimeError(f"not timed: the gate '{gate}' was not passed")

    def decode(self, name: str, rows: int, context: int, variant: str) -> None:
        if variant == "compiled" or name == "ours":
            self.require_gate(f"compiled {name}" if variant == "compiled" else "model")
        self.time(jobs.decode(self.bench, self.sides[name], rows, context, self.sizes.steps, variant), rounds=1)

    def prefill(self, length: int, whole: bool) -> None:
        self.require_gate("model")
        self.time(jobs.prefill_prompts(self.bench, self.sides["ours"], 1, length, whole))

    def throughput(self, name: str) -> None:
        if name == "ours":
            self.require_gate("model")
        sizes, side = self.sizes, self.sides[name]
        self.keep(jobs.throughput(self.bench, side, sizes.prompt, sizes.tokens_out, sizes.steps, sizes.most_rows))

    def long_context(self) -> None:
        self.keep(jobs.memory(self.bench, self.sides["ours"], self.sizes.memory_context, whole=False))

    def vllm(self) -> None:
        self.sides.clear()
        torch.compiler.reset()
        give_memory_back(self.bench.device)
        sizes, ours = self.sizes, next(self.journal.find("throughput", "ours"), None)
        rows = sizes.most_rows if ours is None else ours.rows
        self.keep(vllm_peer.throughput(self.config, self.bench.dtype, rows, sizes.prompt, sizes.tokens_out))

    def train(self, compiled: bool, fp8: bool) -> None:
        self.require_gate("slice")
        config = depth_slice(self.config, min(self.sizes.train_layers, self.config.num_hidden_layers))
        side = build_ours(config, self.bench.dtype, self.bench.device)
        self.time(jobs.train(self.bench, side, self.sizes.train_tokens, compiled, fp8))
        torch.compiler.reset()

    def time(self, job: Job, rounds: int | None = None) -> None:
        (found,) = take_turns(self.bench, [job], rounds)
        self.keep(found)

    def keep(self, found: Measurement) -> None:
        self.journal.add(found)
        figures = "  ".join(f"{name} {value:,.4g}" for name, value in found.figures.items())
        self.bench.say(f"  {found.failure or f'{found.median:.4g} s  {figures}'}")


def targets(journal: Journal, sizes: Sizes) -> list[Target]:
    """The table of targets: what one run says about each, None where it does not."""
    small, large = (
        {"context": sizes.small_context, "rows": 1},
        {"context": sizes.large_context, "rows": sizes.large_rows},
    )
    ours = fastest(journal.find("decode", "ours", **small))
    native = fastest(journal.find("decode", "native", "eager", **small))
    batch = fastest(journal.find("decode", "ours", **large))
    parts = fastest(journal.find("prefill", "ours", "in parts", context=sizes.prompt))
    whole = fastest(journal.find("prefill", "ours", "whole", context=sizes.prompt))
    short = fastest(journal.find("prefill", "ours", "in parts", context=sizes.short_prompt))
    rate = {name: fastest(journal.find("throughput", name)) for name in ("ours", "qwen2", "llama")}
    train = fastest(m for m in journal.find("train", "ours") if not m.variant.startswith("fp8"))
    fp8 = fastest(m for m in journal.find("train", "ours") if m.variant.startswith("fp8"))
    long = fastest(journal.find("memory", "ours", context=sizes.memory_context))
    mfu = "mfu" if train and "mfu" in train.figures else "share_of_matrix_rate"
    predicted = figure(long, "measured_over_predicted")
    batched = f"decode, {sizes.large_rows} rows after {sizes.large_context:,} tokens"
    per_token = {name: found and found.median / found.rows for name, found in rate.items()}
    return [
        Target(f"decode, 1 row after {sizes.small_context:,} tokens: share of the floor", share(ours), 0.8, True),
        Target("decode, 1 row: times native eager's speed", ratio(native, ours), 3.0, True),
        Target(f"{batched}: share of the floor", share(batch), 0.6, True),
        Target(f"prefill {sizes.prompt:,}: share of the matrix rate", figure(parts, "share_of_matrix_rate"), 0.5, True),
        Target(f"prefill {sizes.prompt:,}: time in parts over whole", ratio(parts, whole), 1.05),
        Target(
            f"prefill {sizes.prompt:,}: memory beyond weights and cache, over that of {sizes.short_prompt:,}",
            divide(working_bytes(parts), working_bytes(short)),
            1.5,
        ),
        Target("throughput: times a Qwen2.5-shaped peer's", divide(per_token["qwen2"], per_token["ours"]), 1.8, True),
        Target("throughput: times a Llama-shaped peer's", divide(per_token["llama"], per_token["ours"]), 3.0, True),
        Target(f"training step of {sizes.train_layers} layers: {mfu}", figure(train, mfu), 0.45, True),
        Target("training step: FP8's speed over that of the run's dtype", ratio(train, fp8), 1.2, True),
        Target(f"{sizes.memory_context:,} tokens of context: runs", runs(journal, "memory"), 1.0, True),
        Target(
            f"{sizes.memory_context:,} tokens of context: memory off its prediction by",
            None if predicted is None else abs(predicted - 1),
            0.05,
        ),
    ]


def share(found: Measurement | None) -> float | None:
    """Of the floor."""
    return None if found is None else found.share_of_floor


def runs(journal: Journal, part: str) -> float | None:
    """1 if a job of this part ended, 0 if none did, None if none was begun."""
    ended = [bool(m.seconds) for m in journal.measurements if m.part == part]
    return float(any(ended)) if ended else None


def figure(found: Measurement | None, name: str) -> float | None:
    """One of its figures."""
    return None if found is None else found.figures.get(name)


def working_bytes(found: Measurement | None) -> int | None:
    """Peak beyond weights, keys and values, and states."""
    if found is None or found.peak_bytes is None:
        return None
    return found.peak_bytes - sum(found.predicted_bytes[kind] for kind in ("weights", "kv", "state"))


def divide(a: float | None, b: float | None) -> float | None:
    """a / b, None if either is not there."""
    return None if a is None or b is None else a / b
