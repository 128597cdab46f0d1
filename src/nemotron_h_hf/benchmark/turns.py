"""Several sides of one job, measured alternately: a drift of the machine affects all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .devices import Rates, run_within
from .records import Measurement


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    Args:
        budget_bytes: what a job may take beyond what is held before it, on a CPU; None for all there is.
        say: told about progress.
    """

    device: torch.device
    dtype: torch.dtype
    rates: Rates
    num_runs: int
    budget_bytes: int | None
    say: Callable[[str], None]

    def floor(self, work: tuple[float, float]) -> float:
        """Seconds that these bytes and operations take at least."""
        return self.rates.floor_seconds(*work)


@dataclass
class Job:
    """One side of a comparison.

    Args:
        found: what the samples go into.
        sample: one round; its seconds, one or several samples.
        prepare: done once before all rounds; what it takes is the warm-up.
        figures: what the samples mean, by name, asked at the end.
    """

    found: Measurement
    sample: Callable[[], Sequence[float]]
    prepare: Callable[[], float] = lambda: 0.0
    figures: Callable[[Measurement], dict[str, float]] = field(default=lambda _: {})


def take_turns(bench: Bench, jobs: Sequence[Job], num_runs: int | None = None) -> list[Measurement]:
    """Prepare every job, then take one round of each, `num_runs` times over (None: the bench's number).

    Sample i of all jobs is from the same round. A job that runs out of memory says so in its `failure`, and the others
    go on.
    """
    num_runs = bench.num_runs if num_runs is None else num_runs
    for job in jobs:
        job.found.warm_up_seconds += _within(bench, job, job.prepare) or 0.0
    for number in range(num_runs):
        for job in jobs:
            taken = _within(bench, job, job.sample)  # memory that runs out takes the earlier rounds with it
            job.found.seconds.extend(taken or ())
        _tell_round(bench, jobs, number, num_runs)
    for job in jobs:
        if job.found.seconds:
            job.found.figures |= job.figures(job.found)
    return [job.found for job in jobs]


def _within(bench: Bench, job: Job, work: Callable[[], object]) -> object:
    """The result; None if memory runs out now or ran out before."""
    if job.found.failure:
        return None
    result, peak, job.found.failure = run_within(work, bench.device, bench.budget_bytes)
    if job.found.failure:
        job.found.seconds = []
        return None
    if bench.device.type == "cuda" and work is job.sample:
        job.found.peak_bytes = max(peak or 0, job.found.peak_bytes or 0)
    return result


def _tell_round(bench: Bench, jobs: Sequence[Job], number: int, num_runs: int) -> None:
    first = jobs[0].found
    took = "  ".join(f"{j.found.side} {j.found.variant} {j.found.seconds[-1]:.4g}" for j in jobs if j.found.seconds)
    bench.say(f"{first.part} {first.rows} x {first.context:,}, round {number + 1} of {num_runs}, seconds: {took}")
