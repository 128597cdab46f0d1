"""One step ahead: the next tensor is read while the one before is checked and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def ahead(items: Iterable[Item], load: Callable[[Item], Loaded]) -> Iterator[tuple[Item, Loaded]]:
    """(item, load(item)) in order; at most two loaded things are alive, the one handed out and the next."""
    waiting = iter(items)
    with ThreadPoolExecutor(1) as pool:
        item = next(waiting, None)
        future = None if item is None else pool.submit(load, item)
        while future is not None:
            loaded = future.result()
            following = next(waiting, None)
            future = None if following is None else pool.submit(load, following)
            yield item, loaded
            item = following
            del loaded
