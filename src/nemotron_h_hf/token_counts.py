"""Numbers of tokens as people write them: 380000000000, "380B", "1.5b", "6_000", or a share of the run such as "60%"."""

import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
WRITTEN = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([KMBT%]?)", re.IGNORECASE)


def parse_tokens(value: int | float | str, name: str, total_tokens: int | None = None) -> int:
    """The number, rounded to a whole one.

    Args:
        name: what the number is, for the error.
        total_tokens: what a share is of; None where a share makes no sense.

    Raises:
        ValueError: naming `name`, the value and what is allowed.
    """
    match = WRITTEN.fullmatch(str(value).replace(",", "").replace("_", "").strip())
    if match is None or isinstance(value, bool) or (match[2] == "%" and total_tokens is None):
        share = "" if total_tokens is None else ", or a share such as 20%"
        raise ValueError(
            f"{name}: got {value!r}, allowed is a number of tokens such as 2500000, 4K, 2.5M, 6.3B, 15T{share}"
        )
    if match[2] == "%":
        return round(float(match[1]) / 100 * total_tokens)
    return round(float(match[1]) * UNITS[match[2].upper()])
