"""Prometheus metrics of an engine: what it reports as it runs, and what it holds now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from .engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
HISTOGRAMS = {
    "queue_seconds": ("from arrival to the start", SECONDS),
    "first_token_seconds": ("from arrival to the first token", SECONDS),
    "token_seconds": ("between two tokens of a row", SECONDS),
    "step_seconds": ("of one decode step of a batch", SECONDS),
    "batch_rows": ("rows in one decode step", ROWS),
}
COUNTERS = {
    "prompt_tokens": "tokens of prompts", "cached_tokens": "of these, not read again", "generated_tokens": "new tokens",
}  # fmt: skip
GAUGES = {
    "image_bytes": "of the parent's weights", "cache_bytes": "of running rows", "prefix_bytes": "of kept prompts",
    "reserved_bytes": "that running rows may come to take", "memory_bytes": "that caches may take", "waiting": "requests",
    "reading": "prompts being read",
}  # fmt: skip


class Metrics:
    """`report` is the engine's `watch`; `text` is what `/metrics` says."""

    def __init__(self, name: str) -> None:
        self.name, self.engine = name, None
        self.registry = CollectorRegistry()
        labels, prefix = ("model", "budget"), "nemotron_h_"
        self.histograms = {
            what: Histogram(prefix + what, text, labels, buckets=buckets, registry=self.registry)
            for what, (text, buckets) in HISTOGRAMS.items()
        }
        self.counters = {
            what: Counter(prefix + what, text, labels, registry=self.registry) for what, text in COUNTERS.items()
        }
        self.requests = Counter(
            prefix + "requests", "by how they ended", ("model", "budget", "reason"), registry=self.registry
        )
        self.registry.register(self)

    def of(self, engine: Engine) -> None:
        """Tell what this engine holds, too."""
        self.engine = engine

    def report(self, what: str, budget: str, value: float) -> None:
        """One thing that happened."""
        if what == "requests":
            self.requests.labels(self.name, *budget.split("|")).inc()
        elif what in self.counters:
            self.counters[what].labels(self.name, budget).inc(value)
        else:
            self.histograms[what].labels(self.name, budget).observe(value)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What is held now, for the registry."""
        if self.engine is None:
            return
        status = self.engine.status()
        for what, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"nemotron_h_{what}", text, labels=["model"])
            gauge.add_metric([self.name], status[what])
            yield gauge
        for what, values in (("extra_bytes", status["extra_bytes"]), ("running_rows", status["rows"])):
            gauge = GaugeMetricFamily(f"nemotron_h_{what}", what.replace("_", " "), labels=["model", "budget"])
            for budget, value in values.items():
                gauge.add_metric([self.name, budget], value)
            yield gauge

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
