"""Sizes as people write them, with one meaning for tokens, parameters and bytes.

k = 1,000, M = 1,000,000, G and T; Ki = 1,024, Mi = 1,048,576, Gi and Ti. Bytes end in B: GB is 10^9, GiB is 2^30. Without
bytes, B is 10^9 as well ("8.9B" parameters). Upper and lower case mean the same. "7GiB@32Ki" is a need: bytes of weights
and of the cache of that many tokens.
"""

import argparse
import math
import re
from collections.abc import Mapping
from typing import Any

from .errors import require

PREFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
COUNTS = PREFIXES | {"B": 10**9}
BYTES = {prefix + "B": factor for prefix, factor in PREFIXES.items()} | {"": 1}
SECONDS = {"": 1, "S": 1, "MS": 1e-3, "US": 1e-6}
NUMBER = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*|%)", re.IGNORECASE)
TOKENS_HELP = "32k is 32,000 and 32Ki 32,768"


def parse(value: Any, name: str, units: Mapping[str, float], allowed: str, whole: float | None = None) -> float:
    """A number with one of the units, or a share such as "20%" of `whole`, where there is one.

    Raises:
        ValueError: naming `name`, the value and what is allowed.
    """
    match = NUMBER.fullmatch(re.sub("[,_]", "", str(value)).strip())
    require(match is not None and not isinstance(value, bool), name, value, allowed)
    unit = match[2].upper()
    require(unit in units or (unit == "%" and whole is not None), name, value, allowed)
    number = float(match[1]) * whole / 100 if unit == "%" else float(match[1]) * units[unit]
    require(math.isfinite(number), name, value, allowed)
    return number


def parse_tokens(value: int | float | str, name: str, total_tokens: int | None = None) -> int:
    """Tokens, rounded to a whole number: 380000000000, "380B", "1.5b", "6_000", "32Ki", or "60%" of `total_tokens`."""
    share = "" if total_tokens is None else ", or a share such as 20%"
    allowed = f"a number of tokens such as 2500000, 4K (4,000), 4Ki (4,096), 2.5M, 6.3B, 15T{share}"
    return round(parse(value, name, COUNTS, allowed, total_tokens))


def parse_bytes(value: int | str, name: str) -> int:
    """Bytes, at least one: 5000000, "5GB" (10^9 each), "2GiB" (2^30 each)."""
    allowed = "a size such as 5GB, 500MB or 2GiB"
    found = int(parse(value, name, BYTES, allowed))
    require(found >= 1, name, value, allowed)
    return found


def parse_need(text: str) -> tuple[float, int]:
    """Bytes and tokens of a need: "7GiB@32Ki"; "7GiB" has 0 tokens."""
    size, at, context = text.partition("@")
    units = {unit: factor for unit, factor in BYTES.items() if len(unit) > 1}  # a bare number is a share
    return parse(size, "need", units, "7GiB"), parse_tokens(context, "need") if at else 0


def tokens(text: str) -> int:
    """Tokens, for argparse's `type`."""
    try:
        return parse_tokens(text, "number")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def human_bytes(num_bytes: float, *, digits: int = 1, up: bool = False) -> str:
    """1536 -> '1.5 KiB'; rounded `up` for a least size, that the text itself is enough."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    if units[0] == "B":
        return f"{size:.0f} B"
    return f"{math.ceil(size * 10**digits) / 10**digits if up else size:.{digits}f} {units[0]}"


def human_count(count: int) -> str:
    """8100852736 -> '8.10 B'."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return str(count)
