"""What a benchmark found, in a JSON file that is whole after every measurement: a run that is killed keeps what it has."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..whole_files import write_json

RATES = ("tokens_per_second", "output_tokens_per_second")  # the figure that says how fast a job is, whichever it has


@dataclass
class Measurement:
    """One job of one model.

    Args:
        part: decode, prefill, throughput, train or memory.
        side, variant: which model, and how it was run.
        rows, context: sequences, and tokens in each before the job (of a prefill or training step: in it).
        seconds: samples; of one step, of one prompt or batch of prompts, of one training step.
        floor_seconds: what no implementation on this device can beat.
        warm_up_seconds: spent before the samples, on compilation and captured graphs among others.
        peak_bytes, predicted_bytes: memory measured, and as the configuration says, by kind; the total is what to compare.
        figures: what else was found, by name.
        failure: why there are no samples.
    """

    part: str
    side: str
    variant: str
    rows: int
    context: int
    seconds: list[float] = field(default_factory=list)
    floor_seconds: float | None = None
    warm_up_seconds: float = 0.0
    peak_bytes: int | None = None
    predicted_bytes: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def median(self) -> float | None:
        """Seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def rate(self) -> float | None:
        """Tokens per second."""
        return next((self.figures[name] for name in RATES if name in self.figures), None)

    @property
    def share_of_floor(self) -> float | None:
        """How much of the time the floor takes: 1 could not be better."""
        return self.floor_seconds / self.median if self.seconds and self.floor_seconds else None


@dataclass(frozen=True)
class Target:
    """One promise: `value` must be at most (or at least) `limit`. A value of None was not measured."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "met" if met else "missed"


def fastest(found: Iterable[Measurement]) -> Measurement | None:
    """The one with the least median, None of none."""
    return min(found, key=lambda measurement: measurement.median, default=None)


def ratio(slow: Measurement | None, fast: Measurement | None) -> float | None:
    """How many times longer the one takes: the median over the rounds if they were measured in turns, else of medians."""
    if slow is None or fast is None or not slow.seconds or not fast.seconds:
        return None
    if len(slow.seconds) != len(fast.seconds):
        return slow.median / fast.median
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds))


class Journal:
    """The measurements so far, written out after each.

    Args:
        path: the JSON file.
        head: what is known before measuring (command, machine, versions, settings).
        targets: makes the list of targets from the measurements; asked at every writing.
    """

    def __init__(self, path: Path, head: dict, targets: Callable[["Journal"], list[Target]] = lambda _: []) -> None:
        self.path, self.head, self.targets = path, head, targets
        self.measurements: list[Measurement] = []
        self.finished = False

    def add(self, measurement: Measurement) -> Measurement:
        """Keep one more, on disk too."""
        self.measurements.append(measurement)
        self.write()
        return measurement

    def note(self, name: str, value: object) -> None:
        """Keep a fact of the whole run, such as the rates or the errors of the gate."""
        self.head[name] = value
        self.write()

    def find(self, part: str, side: str, variant: str | None = None, **values: int) -> Iterator[Measurement]:
        """Those that have samples and fit."""
        for found in self.measurements:
            fits = found.part == part and found.side == side and variant in (None, found.variant)
            if fits and found.seconds and all(getattr(found, name) == value for name, value in values.items()):
                yield found

    def add_errors(self, errors: dict[str, float]) -> None:
        """Keep what a gate found, by name."""
        self.note("correctness", {**self.head.get("correctness", {}), **errors})

    def document(self) -> dict:
        """All of it."""
        rows = [
            {**asdict(m), "median_seconds": m.median, "share_of_floor": m.share_of_floor} for m in self.measurements
        ]
        targets = [{**asdict(target), "verdict": target.verdict} for target in self.targets(self)]
        return {**self.head, "finished": self.finished, "measurements": rows, "targets": targets}

    def finish(self) -> None:
        """Everything that was asked for is there."""
        self.finished = True
        self.write()

    def write(self) -> None:
        """Whole or not at all."""
        write_json(self.path, self.document())
