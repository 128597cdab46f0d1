"""Failures as OpenAI's clients know them: a status, and a body that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from .requests import Busy, Stopped, TooLarge

KINDS = {"str": str, "float": (int, float), "list": list}  # of the branches of a field with several forms


class Failure(HTTPException):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, {} if retry_after is None else {"Retry-After": str(retry_after)})
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.body: dict[str, Any] = {
            "error": {
                "message": _encodable(message),
                "type": kind if status < 500 else "server_error",
                "param": param and _encodable(param),
                "code": code,
            }
        }

    def response(self) -> JSONResponse:
        """It as an answer."""
        return JSONResponse(self.body, self.status_code, self.headers)


def failure_of(error: Exception, said_as: Mapping[str, str] | None = None) -> Failure:
    """What to say of an exception; of an unexpected one only its type, as its words may quote the prompt.

    Args:
        said_as: field -> the name that the client gave it.
    """
    if isinstance(error, Failure):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        if error.__cause__ is not None:  # FastAPI could not read the body
            return Failure(400, f"the body is not JSON: {type(error.__cause__).__name__}", code="invalid_json")
        return Failure(error.status_code, str(error.detail))
    if isinstance(error, Busy):
        return Failure(429, str(error), code="queue_full", retry_after=error.seconds)
    if isinstance(error, ValueError):
        code = "context_length_exceeded" if isinstance(error, TooLarge) else None
        return Failure(400, *_named(str(error), said_as or {}), code)
    if isinstance(error, Stopped):
        return Failure(503, str(error), code="shutting_down", retry_after=10)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Failure(503, "out of memory", code="out_of_memory", retry_after=10)
    return Failure(500, f"the request failed ({type(error).__name__})")


def _named(text: str, said_as: Mapping[str, str]) -> tuple[str, str | None]:
    """A message that begins with a field, and the field, both with the client's name of it."""
    field = re.match(r"[\w.]+(?=[:=])", text)
    if field is None:
        return text, None
    name = said_as.get(field[0], field[0])
    return name + text[field.end() :], name


def _invalid(errors: Sequence[dict[str, Any]]) -> Failure:
    """The first thing that is wrong with a body."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Failure(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if isinstance(first["input"], bytes):
        return Failure(400, "Content-Type: allowed is application/json")
    place, said, given = _place_and_words(errors)
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        return Failure(400, f"{name}: not supported", name, "unsupported_field")
    shown = "" if first["type"] == "missing" else f"={str(given)[:80]!r}"
    return Failure(
        400, f"{name or 'the body'}{shown}: {said.removeprefix('Value error, ')}", place[0] if place else None
    )


def _place_and_words(errors: Sequence[dict[str, Any]]) -> tuple[list[str], str, Any]:
    """Where the first error is, what is wrong, and the value. Of a field with several forms pydantic tells of each."""
    first = errors[0]
    loc = [str(part) for part in first["loc"] if part != "body"]
    fork = next((i for i, part in enumerate(loc) if re.fullmatch(r"str|float|list\[.*\]", part)), None)
    if fork is None:
        return loc, first["msg"], first["input"]
    branches = [(it, [str(part) for part in it["loc"] if part != "body"]) for it in errors]
    branches = [(it, at) for it, at in branches if at[:fork] == loc[:fork] and len(at) > fork]
    value = first["input"]  # the branch of plain text sees all of it
    for it, at in branches:
        if len(at) > fork + 1 and isinstance(value, KINDS[at[fork].partition("[")[0]]):
            return at[:fork] + at[fork + 1 :], it["msg"], it["input"]
    forms = dict.fromkeys(at[fork] for _, at in branches)
    return loc[:fork], f"allowed is {' or '.join(forms)}", value


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
