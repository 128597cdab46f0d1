"""Stage candidates.json: every smaller model within the limits, and one of mixed widths where asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..compression.candidates import Candidate, CostByLayer, Found, costs_of, find_candidates, read_candidates
from ..compression.layer_scores import LayerScores
from ..compression.mixed_widths import FIELDS, best_mixed
from ..elastic.budgets import CHOICE_FIELDS
from ..elastic.resolve import resolve
from ..errors import require
from ..inputs import read_json
from ..model.configuration_nemotron_h import NemotronHConfig
from ..tensors import size
from .run import Run


def search(run: Run, scores: Mapping[str, Any]) -> list[Candidate]:
    """The candidates, of the file if it is there."""
    stage, arguments = run.stages["candidates"], run.arguments
    if (known := stage.result()) is not None:
        return list(read_candidates(known["candidates"]))
    costs, limits = all_costs(run), arguments.limits()
    found = _found(run, importance_of(run, scores), costs)
    candidates = list(found.candidates)
    if arguments.mixed_widths:
        widths = {name: sizes for name, sizes in run.sizes.items() if name in FIELDS.values()}
        require(
            bool(widths), "mixed_widths", True, f"false where none of {', '.join(FIELDS.values())} is among the sizes"
        )
        errors = LayerScores(scores["errors"]).narrowed(arguments.layer_score)
        candidates.append(best_mixed(run.config, errors, widths, arguments.counts, costs, limits))
    stage.finish(
        num_models=found.num_models, num_fitting=found.num_fitting, limits=limits,
        teacher={name: sum(cost(run.config).values()) for name, cost in costs.items()},
        candidates=[one.to_dict() for one in candidates],
    )  # fmt: skip
    return candidates


def check_grid(run: Run) -> None:
    """Before hours of scoring: the errors of `search` that no scores change; none where layers of a kind differ in size.

    Raises:
        ValueError: for limits that nothing or the teacher itself fits, or sizes, counts or times that the teacher cannot have.
    """
    if not any(isinstance(getattr(run.config, name), list) for name in CHOICE_FIELDS):
        _found(run, dict.fromkeys(range(run.config.num_hidden_layers), 0.0), all_costs(run))


def _found(run: Run, importance: Mapping[int, float], costs: Mapping[str, CostByLayer]) -> Found:
    arguments = run.arguments
    found = find_candidates(
        run.config, importance, run.sizes, arguments.counts, costs, arguments.limits(), arguments.keep
    )
    resolve(run.config, found.candidates[0].sizes)  # sizes that no budget may have
    return found


def importance_of(run: Run, scores: Mapping[str, Any]) -> dict[int, float]:
    """Layer -> importance by the measure and reduction asked for."""
    values = scores["importance"][run.arguments.layer_score][run.arguments.reduce]
    return {int(layer): value for layer, value in values.items()}


def all_costs(run: Run) -> dict[str, CostByLayer]:
    """Those by formula, and seconds where there is a table."""
    costs = costs_of(run.arguments.deployment)
    if run.arguments.latency is not None:
        costs["seconds"] = seconds_of_table(read_json(run.arguments.latency))
    return costs


def seconds_of_table(table: Mapping[str, Any]) -> CostByLayer:
    """Of a table {"outside": s, "full_attention": s, "mlp": {"24576": s, ...}}; a mapping is by the kind's width.

    Raises:
        ValueError: for a kind or width that the table lacks.
    """
    widths = {"mlp": "intermediate_size", "moe": "moe_intermediate_size", "linear_attention": "mamba_num_heads",
              "full_attention": "num_attention_heads"}  # fmt: skip

    def seconds(config: NemotronHConfig) -> Counter[int | None]:
        found: Counter[int | None] = Counter({None: _number(table, "outside", None)})
        for layer, kind in enumerate(config.layers_block_type):
            found[layer] = _number(table, kind, size(config, widths[kind], layer))
        return found

    return seconds


def _number(table: Mapping[str, Any], kind: str, size: int | None) -> float:
    entry = table.get(kind)
    if isinstance(entry, Mapping):
        require(str(size) in entry, f"latency.{kind}", size, ", ".join(entry))
        entry = entry[str(size)]
    require(isinstance(entry, (int, float)), f"latency.{kind}", entry, "seconds, or seconds by size")
    return entry
