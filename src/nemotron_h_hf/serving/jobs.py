"""What the engine works on: a request on its way, and a prompt being read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..elastic.child import Child
from ..model.cache import HybridCache
from .requests import Piece, Request
from .row import Row

Deliver = Callable[["Piece | Exception"], None]


@dataclass(eq=False)
class Job:
    """A request on its way; `deliver` gets its pieces, or one exception, in the engine's thread."""

    request: Request
    deliver: Deliver
    child: Child
    answer: Child | None
    rows: list[Row] = field(default_factory=list)
    cancelled: bool = False
    num_cached: int = 0  # tokens of the prompt that need not be read
    since: float = field(default_factory=time.monotonic)
    last: float | None = None  # when the last token came

    def cancel(self) -> None:
        """Let it go at the next turn; nothing more is delivered."""
        self.cancelled = True


@dataclass(eq=False)
class Reading:
    """A prompt, or a text that another budget goes on with, being read for rows that all have it."""

    job: Job
    rows: list[Row]
    child: Child
    tokens: list[int]
    cache: HybridCache | None = None
    position: int = 0
