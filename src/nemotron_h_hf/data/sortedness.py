"""Whether records are in sorted order, of which a window sees only a part."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

FEWEST = 16  # records; fewer may be in order by chance
SAMPLED = 64


def spread(count: int) -> list[int]:
    """Up to SAMPLED numbers below `count`, evenly spaced, the first and the last among them."""
    number = min(count, SAMPLED)
    return [place * (count - 1) // max(number - 1, 1) for place in range(number)]


def sorted_by(values: Sequence[Any]) -> str | None:
    """What the values (texts, or mappings and their fields) rise or fall by, such as "their field 'date'"; None if nothing."""
    if len(values) < FEWEST:
        return None
    if all(isinstance(value, str) for value in values):
        return "their text" if _monotone(values) else None
    if not all(isinstance(value, Mapping) for value in values):
        return None
    for field in values[0]:
        column = [value.get(field) for value in values]
        same_kind = len({type(item) for item in column}) == 1 and isinstance(column[0], (str, int, float))
        if same_kind and _monotone(column):
            return f"their field {field!r}"
    return None


def _monotone(values: Iterable[Any]) -> bool:
    """Whether values never fall or never rise, and are not all the same."""
    steps = [(a > b) - (a < b) for a, b in pairwise(values)]
    return any(steps) and (min(steps) >= 0 or max(steps) <= 0)
