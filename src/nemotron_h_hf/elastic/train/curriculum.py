"""Which budget a micro-step trains, and how: stages of the run, and draws that depend on seed, step and micro-step alone.

    stages:
    - {until: 60%, sequence_length: 8192}                              every budget equally often
    - {weights: {12b: 0.5, 9b: 0.3, 6b: 0.2}}                          to the end, on whole rows

Every process draws the same: with a hard choice of depth all of them skip the same layers, and the gathers of a
sharded model meet. A stage with shorter sequences cuts each row into equal ones, so a step has as many tokens as in any
other stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import require
from ...units import parse_tokens
from .choices import Axis
from .router import generator_of, gumbel_noise

IGNORED = -100


class Draw(NamedTuple):
    """What is random in a micro-step."""

    budget: int
    hard: bool
    noise: dict[str, Tensor]  # field -> (r, c)


@dataclass(frozen=True)
class Stage:
    """A part of the run: until which token, how often each budget, and how long the sequences."""

    until_tokens: int
    weights: tuple[float, ...]
    sequence_length: int


def stages_of(
    entries: Sequence[Mapping[str, Any]] | None, budgets: Sequence[str], total_tokens: int, sequence_length: int
) -> tuple[Stage, ...]:
    """The stages of a run; without entries, one in which all budgets are drawn equally often.

    Args:
        entries: `until` (tokens or a share of the run; not of the last), `weights` by budget, `sequence_length`.
        sequence_length: of rows; a stage's divides it.

    Raises:
        ValueError: naming the stage, the field, the value and what is allowed.
    """
    found: list[Stage] = []
    entries = list(entries or [{}])
    for number, entry in enumerate(entries):
        name = f"stages[{number}]"
        require(isinstance(entry, Mapping), name, entry, "a mapping")
        for key in entry:
            require(key in ("until", "weights", "sequence_length"), name, key, "until, weights, sequence_length")
        last = number == len(entries) - 1
        require(("until" in entry) is not last, f"{name}.until", entry.get("until"),
                "none, the last stage goes to the end" if last else "where the stage ends, such as 60% or 65B")  # fmt: skip
        until = total_tokens if last else parse_tokens(entry["until"], f"{name}.until", total_tokens)
        begin = found[-1].until_tokens if found else 0
        require(begin <= until <= total_tokens, f"{name}.until", until, f"{begin} to the run's {total_tokens} tokens")
        length = entry.get("sequence_length", sequence_length)
        divides = isinstance(length, int) and length > 0 and sequence_length % length == 0
        require(divides, f"{name}.sequence_length", length, f"a divisor of the rows' sequence_length={sequence_length}")
        found.append(Stage(until, _weights(entry.get("weights"), budgets, name), length))
    return tuple(found)


def stage_at(stages: Sequence[Stage], tokens: int) -> Stage:
    """The stage of a step before which `tokens` were seen."""
    return next((stage for stage in stages if tokens < stage.until_tokens), stages[-1])


def draw(
    weights: Sequence[float],
    axes: Sequence[Axis],
    hard_share: float,
    seed: int,
    step: int,
    micro_step: int,
    sandwich: bool = False,
) -> Draw:
    """The draw of a micro-step: a function of its arguments, the same on every process. With `sandwich` the first micro-step of
    a step has the largest budget, the second the smallest (universally slimmable networks, arXiv 1903.05134)."""
    generator = generator_of(seed, step, micro_step)
    budget = int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator))
    if sandwich and micro_step < 2:
        budget = (0, len(weights) - 1)[micro_step]
    hard = bool(torch.rand((), generator=generator) < hard_share)
    return Draw(budget, hard, gumbel_noise(axes, generator))


def shorter(batch: Mapping[str, Tensor], sequence_length: int) -> dict[str, Tensor]:
    """Rows (b, l) cut into (b * l / sequence_length, sequence_length); predictions across a cut are not trained."""
    cut = {name: rows.reshape(-1, sequence_length) for name, rows in batch.items()}
    if "labels" in cut:
        cut["labels"] = cut["labels"].clone()
        cut["labels"][:, 0] = IGNORED
    return cut


def _weights(weights: Any, budgets: Sequence[str], name: str) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(budgets)
    require(isinstance(weights, Mapping), f"{name}.weights", weights, "a mapping of budgets to numbers")
    for budget, weight in weights.items():
        require(budget in budgets, f"{name}.weights", budget, ", ".join(budgets))
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        require(is_number and weight >= 0, f"{name}.weights.{budget}", weight, "a number of 0 or more")
    require(sum(weights.values()) > 0, f"{name}.weights", weights, "one above 0 at least")
    return tuple(float(weights.get(budget, 0.0)) for budget in budgets)
