"""Failures as OpenAI's clients know them: a status, and a body that names the field."""

from __future__ import annotations

import re
from typing import Any

import torch
from fastapi.exceptions import RequestValidationError

from .requests import Busy, Stopped, TooLarge


class Failure(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.status = status
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self.body: dict[str, Any] = {
            "error": {
                "message": message,
                "type": kind if status < 500 else "server_error",
                "param": param,
                "code": code,
            }
        }


def failure_of(error: Exception) -> Failure:
    """What to say of an exception; of an unexpected one only its type, as its words may quote the prompt."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, Busy):
        return Failure(429, str(error), code="queue_full", retry_after=error.seconds)
    if isinstance(error, TooLarge):
        return Failure(400, str(error), str(error).partition("=")[0], "context_length_exceeded")
    if isinstance(error, ValueError):
        name = re.match(r"\w+(?=[:=])", str(error))
        return Failure(400, str(error), name and name[0])
    if isinstance(error, Stopped):
        return Failure(503, str(error), code="shutting_down", retry_after=10)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Failure(503, "out of memory", code="out_of_memory", retry_after=10)
    return Failure(500, f"the request failed ({type(error).__name__})")


def _invalid(error: RequestValidationError) -> Failure:
    """The first thing that is wrong with a body. Of a field that may have several forms, pydantic tells of each."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Failure(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return Failure(400, f"{'.'.join(place)}: not supported", ".".join(place), "unsupported_field")
    given = "" if first["type"] == "missing" else f"={str(first['input'])[:80]!r}"
    return Failure(400, f"{'.'.join(place) or 'the body'}{given}: {first['msg']}", place[0] if place else None)
