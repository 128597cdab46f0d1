"""Phases of a training run: the weights of the sources, and the tokens from which to which they hold.

    phases:
      - {until: 60%, weights: {web: 0.6, code: 0.4}}
      - {until: 80%, weights: {web: 0.3, code: 0.7}}
      - {weights: {code: 1}}                # up to where the last one begins
      - {last: 380B, weights: {chat: 1}}    # the last 380B tokens of the run

A token count is a number, a number with K, M, B or T (powers of a thousand), or a share of the run such as 60%.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from ..units import parse_tokens


@dataclass(frozen=True)
class Phase:
    """Weights that hold until a token count of the run, or over its last tokens; with neither, until the next phase.

    Args:
        weights: source name -> weight; any positive numbers, only their ratios count. A source left out is not read.
        until: where the phase ends, counted from the beginning of the run.
        last: how many tokens before the end of the run the phase begins; allowed in the last phase only.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    until: int | str | None = None
    last: int | str | None = None


@dataclass(frozen=True)
class Span:
    """A phase in tokens: [start, end) of the run and weights that sum to one."""

    start: int
    end: int
    weights: dict[str, float]


def phases_from(items: Sequence[Mapping]) -> list[Phase]:
    """Phases from the mappings of a YAML file; a key that is unknown is an error that names the nearest."""
    if isinstance(items, Mapping) or isinstance(items, str) or not items:
        raise ValueError(f"phases={items!r}: allowed is a list of mappings with weights and until or last")
    for number, item in enumerate(items, 1):
        check_keys(f"phases, number {number}", item, [f.name for f in fields(Phase)])
    return [Phase(**item) for item in items]


def resolve_phases(phases: Sequence[Phase], sources: Iterable[str], total_tokens: int) -> list[Span]:
    """Where each phase begins and ends; together they cover [0, total_tokens) without gap or overlap.

    Raises:
        ValueError: naming the phase and the field, for weights of unknown sources, ends that do not rise, or a gap.
    """
    if total_tokens <= 0:
        raise ValueError(f"total_tokens={total_tokens}: allowed is a positive number")
    if not phases:
        raise ValueError("phases is empty; at least one is needed")
    known, spans, start = list(sources), [], 0
    for number, phase in enumerate(phases, 1):
        name = f"phases, number {number}"
        following = phases[number] if number < len(phases) else None
        end = _end_of(name, phase, following, start, total_tokens)
        spans.append(Span(start, end, _normalised(name, phase.weights, known)))
        start = end
    if start != total_tokens:
        raise ValueError(f"phases end at {start:,} tokens, total_tokens is {total_tokens:,}; give the last no `until`")
    return spans


def check_keys(place: str, item: object, allowed: Sequence[str]) -> None:
    """Refuse anything but a mapping with keys out of `allowed`; the message names the nearest allowed key."""
    if not isinstance(item, Mapping):
        raise ValueError(f"{place}={item!r}: allowed is a mapping with {', '.join(allowed)}")
    for key in item:
        if key not in allowed:
            nearest = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"allowed are {', '.join(allowed)}"
            raise ValueError(f"{place} has a key {key!r}; {hint}")


def _end_of(name: str, phase: Phase, following: Phase | None, start: int, total_tokens: int) -> int:
    if phase.last is not None:
        if following is not None or phase.until is not None:
            raise ValueError(f"{name}: last is {phase.last!r}; only the last phase may have it, and then no `until`")
        begin = total_tokens - parse_tokens(phase.last, f"{name}, last", total_tokens)
        if begin != start:
            raise ValueError(
                f"{name}: last is {phase.last!r}, so it begins at {begin:,} tokens, but the phases before it end at "
                f"{start:,}; give the phase before it no `until`"
            )
        return total_tokens
    if phase.until is not None:
        end = parse_tokens(phase.until, f"{name}, until", total_tokens)
    elif following is None:
        end = total_tokens
    elif following.last is not None:
        end = total_tokens - parse_tokens(following.last, f"{name}, last of the next phase", total_tokens)
    else:
        raise ValueError(
            f"{name} has no `until`; only the last phase, or one before a phase with `last`, may leave it out"
        )
    if not start < end <= total_tokens:
        raise ValueError(f"{name} ends at {end:,} tokens: allowed is more than {start:,}, up to {total_tokens:,}")
    return end


def _normalised(name: str, weights: Mapping[str, float], known: list[str]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise ValueError(f"{name}: weights={weights!r}: allowed is a mapping from source to number")
    check_keys(f"{name}, weights", weights, known)
    for source, weight in weights.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise ValueError(f"{name}: weight of {source} is {weight!r}: allowed is a number of 0 or more")
    total = math.fsum(weights.values())
    if total <= 0:
        raise ValueError(f"{name}: weights is {dict(weights)!r}; at least one source needs a positive weight")
    return {source: weight / total for source, weight in weights.items() if weight > 0}


def check_windows(spans: Sequence[Span], shuffle_rows: int, sequence_length: int) -> None:
    """Refuse windows of rows that are longer than a phase: they would mix what phases keep apart.

    Raises:
        ValueError: naming how many rows the shortest phase has.
    """
    shortest = min(span.end - span.start for span in spans)
    if len(spans) > 1 and shuffle_rows * sequence_length > shortest:
        raise ValueError(
            f"shuffle_rows={shuffle_rows}: allowed is up to {shortest // sequence_length}, the rows of the shortest phase"
        )
