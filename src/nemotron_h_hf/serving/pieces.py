"""The pieces of a request's jobs, brought from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from .engine import Engine
from .jobs import Job
from .requests import Piece, Request


class Pieces:
    """Iterate over (number of the request, piece) until all rows are done; leaving it cancels the rest."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.jobs: list[Job] = []
        self.num_rows = 0
        self._first: asyncio.Future[Piece | Exception] = loop.create_future()

    def submit(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Queue all of them, or none; raises as `Engine.submit`."""
        try:
            for number, request in enumerate(requests):
                self.jobs.append(engine.submit(request, lambda piece, number=number: self._take(number, piece)))
                self.num_rows += request.n
        except Exception:
            self.cancel()
            raise

    async def begun(self, seconds: float) -> None:
        """Wait for the first piece, for so long at most; raises what comes in its place."""
        await asyncio.wait([self._first], timeout=seconds)
        if self._first.done() and isinstance(self._first.result(), Exception):
            raise self._first.result()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = self.num_rows
        while left:
            number, piece = await self.queue.get()
            if isinstance(piece, Exception):
                self.cancel()
                raise piece
            left -= piece.finish_reason is not None
            yield number, piece

    def cancel(self) -> None:
        """Let go of what still runs."""
        for job in self.jobs:
            job.cancel()

    def give_up(self, reason: Exception) -> None:
        """Cancel, and end the iteration with an exception; from the loop's thread."""
        self.cancel()
        self._put(0, reason)

    def num_cached(self) -> int:
        """Tokens of the prompts that were not read again."""
        return sum(job.num_cached for job in self.jobs)

    def _take(self, number: int, piece: Piece | Exception) -> None:
        self.loop.call_soon_threadsafe(self._put, number, piece)

    def _put(self, number: int, piece: Piece | Exception) -> None:
        self.queue.put_nowait((number, piece))
        if not self._first.done():
            self._first.set_result(piece)
