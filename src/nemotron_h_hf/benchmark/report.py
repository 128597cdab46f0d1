"""What a benchmark run found: the figures, the targets they are held against, the table, and the machine."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from ..environment import machine, versions
from .memory import Footprint
from .timing import Timing

MB, GB = 10**6, 10**9
SIDES = ("floor", "native", "ours")
INT8_SIDES = {
    "fp32": "weights in fp32", "torchao": "int8, torchao's product", "int8": "int8, ours, lm_head in fp32",
    "int8_head": "int8, ours, lm_head as well",
}  # fmt: skip
RATIOS = (("ours", "floor"), ("native", "floor"), ("native", "ours"))


@dataclass
class Results:
    """Everything measured so far; absent parts were not asked for. Memory is keyed by side."""

    errors: dict[str, float] = field(default_factory=dict)
    decode: Timing | None = None
    int8: Timing | None = None
    prefill: list[Timing] = field(default_factory=list)
    train: Timing | None = None
    train_memory: dict[str, Footprint] = field(default_factory=dict)
    long_tokens: int = 0
    long_memory: dict[str, Footprint] = field(default_factory=dict)

    def timings(self) -> list[Timing]:
        return [timing for timing in (self.decode, *self.prefill, self.train, self.int8) if timing is not None]


@dataclass(frozen=True)
class Target:
    """One promise: `value` must be at most (or at least) `limit`. A value of None was not measured."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def targets(results: Results, prefill_tokens: int) -> list[Target]:
    """The targets of the parts that were measured; `prefill_tokens` is the prompt whose speed is promised."""
    found = []
    if results.decode:
        found.append(Target("decode: time over the floor's", _ratio(results.decode, "ours", "floor"), 1.25))
    if results.int8:
        ratio = _ratio(results.int8, "fp32", "int8_head")
        found.append(Target("decode, every Linear in int8: times fp32's speed", ratio, 1.7, True))
    for timing in results.prefill:
        if timing.num_tokens == prefill_tokens:
            found.append(Target(f"{timing.name}: time over the floor's", _ratio(timing, "ours", "floor"), 1.5))
            found.append(Target(f"{timing.name}: times native's speed", _ratio(timing, "native", "ours"), 2.0, True))
    if results.train:
        found.append(
            Target(f"{results.train.name}: times native's speed", _ratio(results.train, "native", "ours"), 1.5, True)
        )
    if results.train_memory:
        ours, native = (results.train_memory[side].extra_bytes for side in ("ours", "native"))
        share = ours / native if ours is not None and native else None
        found.append(Target("training step: extra peak memory over native's", share, 0.5))
    if results.long_memory:
        extra = results.long_memory["ours"].extra_bytes
        gigabytes = None if extra is None else extra / GB
        found.append(Target(f"prefill {results.long_tokens}: GB beyond the weights", gigabytes, 2.0))
    return found


def _ratio(timing: Timing, side: str, other: str) -> float | None:
    ratio = timing.ratio(side, other)
    return None if ratio is None else ratio[0]


def table(results: Results, found: list[Target]) -> list[str]:
    """The report for people, one string per line."""
    lines = ["correctness gate passed:", *(f"  {error:8.1e}  {name}" for name, error in results.errors.items()), ""]
    if timings := [timing for timing in results.timings() if timing is not results.int8]:
        lines += [*_timing_lines(timings), ""]
    if results.int8:
        lines += [*_int8_lines(results.int8), ""]
    if memory := list(_memory_lines(results)):
        lines += ["peak memory beyond the weights, one run in its own process", *memory, ""]
    lines += ["targets", *(_target_line(target) for target in found)]
    return lines


def _timing_lines(timings: list[Timing]) -> Iterator[str]:
    num_runs = max(len(times) for timing in timings for times in timing.samples.values())
    yield f"seconds: median of {num_runs} rounds (least-largest); ratios are medians of the rounds' own"
    heads = "".join(f"{f'{side}/{other}':>14}" for side, other in RATIOS)
    yield f"{'':<14}" + "".join(f"{side:>26}" for side in SIDES) + heads
    for timing in timings:
        cells = "".join(f"{_seconds(timing, side):>26}" for side in SIDES)
        ratios = (_ratio(timing, side, other) for side, other in RATIOS)
        yield f"{timing.name:<14}{cells}" + "".join(f"{'-' if r is None else f'{r:.2f}':>14}" for r in ratios)
        yield f"{'  tokens/s':<14}" + "".join(f"{_rate(timing, side):>26}" for side in SIDES)
        if "linear" in timing.samples:  # torch's product of the same layers, slower than ours for few rows
            over = ", ".join(f"{_ratio(timing, side, 'linear'):.2f} x {side}" for side in ("ours", "native"))
            yield f"  the floor's layers by torch's linear: {_seconds(timing, 'linear')}; times of it: {over}"
        for side, reason in timing.skipped.items():
            yield f"  {side}: {reason}"


def _int8_lines(timing: Timing) -> Iterator[str]:
    yield f"{timing.name}: seconds for {timing.num_tokens} tokens (least-largest), tokens/s, times the speed of fp32"
    for side, name in INT8_SIDES.items():
        ratio = _ratio(timing, "fp32", side)
        yield f"  {name:<34}{_seconds(timing, side):>26}{_rate(timing, side):>10}{'-' if ratio is None else f'{ratio:.2f}':>8}"


def _rate(timing: Timing, side: str) -> str:
    return f"{timing.num_tokens / timing.median(side):,.1f}" if side in timing.samples else "-"


def _seconds(timing: Timing, side: str) -> str:
    if side not in timing.samples:
        return "-"
    times = timing.samples[side]
    return f"{timing.median(side):.3f} ({min(times):.3f}-{max(times):.3f})"


def _memory_lines(results: Results) -> Iterator[str]:
    for side, footprint in results.train_memory.items():
        yield f"  {'training step':<16}{side:<8}{describe(footprint)}, the gradients included"
    for side, footprint in results.long_memory.items():
        yield f"  {f'prefill {results.long_tokens}':<16}{side:<8}{describe(footprint)}"


def describe(footprint: Footprint) -> str:
    """What one job took, or how it failed."""
    if footprint.extra_bytes is not None:
        return f"{footprint.extra_bytes / MB:,.0f} MB in {footprint.seconds:.1f} s"
    needs = "" if footprint.at_least_bytes is None else f"; needs more than {footprint.at_least_bytes / MB:,.0f} MB"
    return f"failed after {footprint.seconds:.1f} s: {footprint.failure}{needs}"


def _target_line(target: Target) -> str:
    verdict = {True: "pass", False: "FAIL", None: "not measured"}[target.passed]
    value = "-" if target.value is None else f"{target.value:.2f}"
    return f"  {verdict:<14}{target.name}: {value} ({'>=' if target.at_least else '<='} {target.limit:g})"


def as_json(results: Results, found: list[Target], command: str, plan: dict) -> dict:
    """Every sample, and what is needed to repeat the run. Times in seconds, memory in bytes."""
    return {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "plan": plan,
        "correctness": results.errors,
        "timings": [
            {"name": t.name, "num_tokens": t.num_tokens, "seconds": t.samples, "skipped": t.skipped}
            for t in results.timings()
        ],
        "train_memory": {side: asdict(footprint) for side, footprint in results.train_memory.items()},
        "long_prefill": {
            "num_tokens": results.long_tokens,
            "memory": {side: asdict(footprint) for side, footprint in results.long_memory.items()},
        },
        "targets": [{**asdict(target), "passed": target.passed} for target in found],
    }
