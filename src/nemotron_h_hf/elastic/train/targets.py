"""How large the nested models shall be: shares of the parent, or numbers in the unit of the metric."""

import re
from collections.abc import Mapping
from typing import Any

from ...training.arguments import require

UNITS = {
    "parameters": {"": 1, "K": 10**3, "M": 10**6, "B": 10**9},
    "memory": {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9},
    "latency": {"": 1, "S": 1, "MS": 1e-3, "US": 1e-6},
}


def targets_of(budgets: Mapping[str, Any], metric: str, full: float) -> dict[str, float]:
    """Name -> target in the unit of the metric, the largest first. 1.0 or "100%" is the parent; one of them has to be.

    Raises:
        ValueError: for a target that is no size, is larger than the parent, or no budget that is the parent.
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
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)", str(value).strip(), re.IGNORECASE)
    require(match is not None and match[1].count(".") <= 1, name, value, allowed)
    number, unit = float(match[1]), match[2].upper()
    require(unit == "%" or unit in UNITS[metric], name, value, allowed)
    is_share = unit == "%" or (unit == "" and number <= 1)
    found = number * full / (100 if unit == "%" else 1) if is_share else number * UNITS[metric][unit]
    require(0 < found <= full, name, value, allowed)
    return found
