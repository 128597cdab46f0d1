"""What stands before the routes: the size of a body, and the API key."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import Failure


class Limits:
    """ASGI middleware: bodies of at most `most` bytes; with keys, everything under /v1 and /status needs one of them."""

    def __init__(self, app: ASGIApp, most: int, keys: Sequence[str]) -> None:
        self.app, self.most, self.keys = app, most, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        too_large = Failure(413, f"the body is larger than {self.most} bytes", code="body_too_large")
        if self.keys and scope["path"].startswith(("/v1", "/status")) and not self._knows(headers):
            return await Failure(401, "the API key is missing or wrong", code="invalid_api_key").response()(
                scope, receive, send
            )
        if not length.isdecimal() or int(length) > self.most:
            return await too_large.response()(scope, receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:  # a body without a length
                raise too_large
            return message

        await self.app(scope, counted, send)

    def _knows(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")  # as it came
        return any([hmac.compare_digest(given, key) for key in self.keys])  # a list: all are compared


def read_keys(path: str | Path) -> list[str]:
    """The keys in a file, one on each line.

    Raises:
        ValueError: if there is none.
    """
    keys = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise ValueError("--api-key-file: the file holds no key: allowed is one on each line")
    return keys
