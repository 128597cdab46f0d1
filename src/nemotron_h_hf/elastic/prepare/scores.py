"""Scores as a file for people and programs."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from ...compression.depth import Removal
from ...compression.importance import Importance
from ...tensors import AXES

SHOWN = tuple(axis for axis in AXES if axis.kind and axis.name not in ("key_value_heads", "expert_neurons"))


def write_scores(path: Path, importance: Importance, removals: list[Removal]) -> None:
    """All scores by axis and layer, in the order that the model had; the routed experts' neurons, being many, apart."""
    record: dict = {"hidden": _numbers(importance.hidden)}
    for axis in SHOWN:
        if layers := getattr(importance, axis.name):
            record[axis.name] = {str(index): _numbers(values) for index, values in layers.items()}
    if removals:
        record["depth"] = [{"removed": r.layer, "scores": {str(k): v for k, v in r.scores.items()}} for r in removals]
    path.write_text(json.dumps(record) + "\n")
    if importance.expert_neurons:
        neurons = {str(index): _numbers(values) for index, values in importance.expert_neurons.items()}
        path.with_name(f"{path.stem}_expert_neurons.json").write_text(json.dumps(neurons) + "\n")


def _numbers(values: Tensor) -> list:
    """With five digits."""
    if values.dim() > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.5g}") for value in values.tolist()]
