"""Wall-clock time of several sides of one job, measured alternately: a drift of the machine affects all alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .memory import memory_guard, out_of_memory


@dataclass
class Timing:
    """Seconds per call of each side, sample i of all sides from the same round; `skipped` says why a side is absent."""

    name: str
    num_tokens: int
    samples: dict[str, list[float]]
    skipped: dict[str, str] = field(default_factory=dict)
    last_results: dict[str, Any] = field(default_factory=dict)

    def median(self, side: str) -> float:
        """Seconds."""
        return statistics.median(self.samples[side])

    def ratio(self, side: str, other: str) -> tuple[float, float, float] | None:
        """How many times longer `side` took than `other`: median, least, largest of rounds; None if one is absent."""
        if side not in self.samples or other not in self.samples:
            return None
        ratios = [a / b for a, b in zip(self.samples[side], self.samples[other], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def time_in_turns(
    name: str,
    num_tokens: int,
    jobs: dict[str, Callable[[], Any]],
    num_runs: int,
    warm_up: dict[str, Callable[[], Any]],
    say: Callable[[str], None],
) -> Timing:
    """Warm every side up once, then take one sample of each, `num_runs` times over.

    A side that runs out of memory is dropped with the reason, the others continue.
    """
    timing = Timing(name, num_tokens, {side: [] for side in jobs})
    for side in jobs:
        _attempt(timing, side, warm_up[side])
    for number in range(num_runs):
        for side in list(timing.samples):
            start = time.perf_counter()
            result = _attempt(timing, side, jobs[side])
            seconds = time.perf_counter() - start
            if side in timing.samples:
                timing.samples[side].append(seconds)
                timing.last_results[side] = result
        took = "  ".join(f"{side} {times[-1]:.3f}" for side, times in timing.samples.items())
        say(f"{name}: round {number + 1} of {num_runs}, seconds: {took}")
    return timing


def _attempt(timing: Timing, side: str, job: Callable[[], Any]) -> Any:
    """The job's result; if memory runs out, None, and the side leaves the timing."""
    try:
        with memory_guard():
            return job()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        timing.samples.pop(side)
        timing.skipped[side] = f"out of memory: {str(error).splitlines()[0]}"
        return None
