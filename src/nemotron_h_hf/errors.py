"""One form of refusal: the field, the value that it was given, and what is allowed."""

from typing import Any


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """`ValueError` naming field, value and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}={value!r}: allowed is {allowed}")
