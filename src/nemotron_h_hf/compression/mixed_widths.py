"""One width for each MLP or MoE layer, and which layers stay, in one knapsack over measured errors (Puzzle, arXiv 2411.19146).

Each layer takes one of its options: gone, narrower, or whole. An option has the mean error of the last hidden state when this
layer alone has it (layer_scores.py), which is 0 for a whole layer, and costs. The sum of the errors is least, every limit
holds. Sums ignore that errors interact; the answer is a candidate like the others, ranked and distilled next to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import require
from ..model.configuration_nemotron_h import NemotronHConfig
from .candidates import KINDS, Candidate, CostByLayer, read_counts, with_sizes

FIELDS = {"mlp": "intermediate_size", "moe": "moe_intermediate_size"}
"""Kind of layer -> the width that may differ between its layers."""


SLACK = 1e-5
"""Of a limit, where the solver, whose sums are right to a millionth, goes beyond it."""


class Option(NamedTuple):
    """What may become of a layer; size 0 is gone, None whole and of a kind without widths."""

    layer: int
    size: int | None
    error: float
    costs: dict[str, float]


def best_mixed(
    config: NemotronHConfig,
    errors: Mapping[int, Mapping[int, float]],
    widths: Mapping[str, Sequence[int]],
    counts: Mapping[str, Sequence[int]],
    costs: Mapping[str, CostByLayer],
    limits: Mapping[str, float],
) -> Candidate:
    """The candidate "mixed".

    Args:
        errors: layer -> size -> error; size 0 for the layer taken out.
        widths: one of FIELDS -> sizes, the teacher's own among them; layers of a kind without stay whole or go.
        counts: as in `find_candidates`.

    Raises:
        ValueError: if nothing fits, or SciPy is not installed.
    """
    outside, options = _options(config, errors, widths, costs)
    for slack in (0.0, SLACK):
        chosen = _solve(config, options, outside, counts, {name: most * (1 - slack) for name, most in limits.items()})
        require(chosen is not None, "budget", dict(limits), "limits that a mix of widths fits")
        found = _candidate(config, chosen, outside)
        if all(found.costs[name] <= most for name, most in limits.items()):
            break
    return found


def _solve(
    config: NemotronHConfig, options: Sequence[Option], outside: Mapping[str, float],
    counts: Mapping[str, Sequence[int]], limits: Mapping[str, float],
) -> list[Option] | None:  # fmt: skip
    """The options of the layers that stay; None if nothing fits. Limits hold to the solver's tolerance."""
    milp, constraint = _solver()
    rows, low, high = [], [], []

    def bound(values: Sequence[float], least: float, most: float) -> None:
        rows.append(values)
        low.append(least)
        high.append(most)

    for layer in range(config.num_hidden_layers):
        bound([float(one.layer == layer) for one in options], 1, 1)
    for name, most in limits.items():  # scaled, as bytes and seconds are far apart
        bound([one.costs[name] / most for one in options], -math.inf, 1 - outside[name] / most)
    there = {kind: config.layers_block_type.count(kind) for kind in KINDS.values() if kind in config.layers_block_type}
    for kind, span in read_counts(counts, there).items():
        of_kind = [float(config.layers_block_type[one.layer] == kind and one.size != 0) for one in options]
        bound(of_kind, span.start, span.stop - 1)
    solved = milp([one.error for one in options], integrality=[1] * len(options), bounds=(0, 1),
                  constraints=constraint(rows, low, high))  # fmt: skip
    return None if solved.x is None else [one for one, taken in zip(options, solved.x) if taken > 0.5 and one.size != 0]


def _options(
    config: NemotronHConfig, errors: Mapping[int, Mapping[int, float]], widths: Mapping[str, Sequence[int]],
    costs: Mapping[str, CostByLayer],
) -> tuple[dict[str, float], list[Option]]:  # fmt: skip
    whole = {name: cost(config) for name, cost in costs.items()}
    by_width = {
        (field, width): {name: cost(with_sizes(config, {field: width})) for name, cost in costs.items()}
        for field, sizes in widths.items()
        for width in sizes
    }
    options = []
    for layer, kind in enumerate(config.layers_block_type):
        options.append(Option(layer, 0, errors[layer][0], dict.fromkeys(costs, 0.0)))
        field = FIELDS.get(kind)
        if field not in widths:
            options.append(Option(layer, None, 0.0, {name: cost.get(layer, 0) for name, cost in whole.items()}))
            continue
        own = config.size(field, layer)
        for width in (width for width in widths[field] if width <= own):
            taken = {name: cost.get(layer, 0) for name, cost in by_width[field, width].items()}
            options.append(Option(layer, width, 0.0 if width == own else errors[layer][width], taken))
    return {name: cost.get(None, 0) for name, cost in whole.items()}, options


def _candidate(config: NemotronHConfig, chosen: Sequence[Option], outside: Mapping[str, float]) -> Candidate:
    sizes: dict[str, Any] = {"layers": [one.layer for one in chosen]}
    for kind, field in FIELDS.items():
        widths = [one.size for one in chosen if one.size is not None and config.layers_block_type[one.layer] == kind]
        if widths:
            sizes[field] = widths[0] if len(set(widths)) == 1 else widths
    kinds = [config.layers_block_type[one.layer] for one in chosen]
    counts = {name: kinds.count(kind) for name, kind in KINDS.items() if kind in config.layers_block_type}
    costs = {name: amount + math.fsum(one.costs[name] for one in chosen) for name, amount in outside.items()}
    return Candidate("mixed", sizes, counts, costs)


def _solver():
    try:
        from scipy.optimize import LinearConstraint, milp
    except ImportError:
        raise ValueError(
            "mixed_widths=true: allowed is false without SciPy; pip install 'nemotron-h-hf[compress]'"
        ) from None
    return milp, LinearConstraint
