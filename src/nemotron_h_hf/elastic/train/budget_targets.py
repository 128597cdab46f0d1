"""Sizes of the nested models: shares of the parent, or numbers in the unit of the metric."""

from collections.abc import Mapping
from typing import Any

from ...errors import require
from ...units import BYTES, COUNTS, SECONDS, parse

UNITS = {"parameters": COUNTS, "memory": BYTES, "latency": SECONDS}


def targets_of(budgets: Mapping[str, Any], metric: str, full: float) -> dict[str, float]:
    """Name -> target in the unit of the metric, the largest first. 1.0 or "100%" is the parent; one of them has to be.

    Raises:
        ValueError: for a target that is no size or larger than the parent, or without a budget that is the parent.
    """
    require(bool(budgets) and isinstance(budgets, Mapping), "budgets", budgets, "a mapping of names to sizes")
    targets = {str(name): parse_target(value, metric, full, f"budgets.{name}") for name, value in budgets.items()}
    ordered = dict(sorted(targets.items(), key=lambda item: -item[1]))
    require(
        list(ordered.values()).count(full) == 1, "budgets", dict(budgets), "sizes of which just one is the parent, 1.0"
    )
    require(len(ordered) > 1, "budgets", dict(budgets), "the parent and at least one that is smaller")
    return ordered


def parse_target(value: Any, metric: str, full: float, name: str) -> float:
    """0.75, "75%", "8.9B" (parameters), "12GiB" (memory) or "30ms" (latency) -> the number in the unit of the metric."""
    allowed = {"parameters": "8.9B", "memory": "12GiB", "latency": "30ms"}[metric]
    allowed = f"a share such as 0.75 or 75%, or {allowed}; at most the parent's {full:g}"
    is_share = str(value).strip().replace(".", "", 1).isdecimal() and float(value) <= 1
    found = float(value) * full if is_share else parse(value, name, UNITS[metric], allowed, full)
    require(not isinstance(value, bool) and 0 < found <= full, name, value, allowed)
    return found
