"""Caches of prompts that were read before, to go on from: exact states, keyed by budget and tokens, least recently used out.

A Mamba state cannot be cut, so a prompt continues from a state kept at exactly the end of one of its parts: a system
message, a turn, every few pieces of reading, the end of an answer.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from ..model.cache import HybridCache

Key = tuple[Hashable, bytes]


class PrefixCache:
    """States of at most `limit` bytes together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self._kept: OrderedDict[Key, HybridCache] = OrderedDict()  # the least recently used first
        self._lengths: dict[Hashable, dict[int, int]] = {}  # budget -> length -> how many are kept

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, budget: Hashable, tokens: Sequence[int], cache: HybridCache) -> None:
        """Keep a cache after these tokens; it becomes the keeper's."""
        key, size = (budget, _bytes(tokens)), cache.memory_bytes()["total"]
        if key in self._kept:
            self._kept.move_to_end(key)
        elif size <= self.limit:
            self.shrink(self.limit - size)
            self._kept[key] = cache
            self.num_bytes += size
            lengths = self._lengths.setdefault(budget, {})
            lengths[len(tokens)] = lengths.get(len(tokens), 0) + 1

    def has(self, budget: Hashable, tokens: Sequence[int]) -> bool:
        """Whether a cache after exactly these tokens is kept."""
        return (budget, _bytes(tokens)) in self._kept

    def longest(self, budget: Hashable, tokens: Sequence[int]) -> tuple[int, HybridCache | None]:
        """How many of the first tokens are kept, at least one less than all, and a copy of the cache after them."""
        whole = _bytes(tokens)
        for length in sorted(self._lengths.get(budget, ()), reverse=True):
            key = (budget, whole[: 8 * length])
            if length < len(tokens) and key in self._kept:
                self._kept.move_to_end(key)
                return length, self._kept[key].fork()
        return 0, None

    def shrink(self, num_bytes: int) -> None:
        """Let go of the least recently used until at most so many bytes are kept."""
        while self._kept and self.num_bytes > num_bytes:
            (budget, tokens), cache = self._kept.popitem(last=False)
            self.num_bytes -= cache.memory_bytes()["total"]
            lengths = self._lengths[budget]
            lengths[len(tokens) // 8] -= 1
            if not lengths[len(tokens) // 8]:
                del lengths[len(tokens) // 8]


def _bytes(tokens: Sequence[int]) -> bytes:
    return array("q", tokens).tobytes()
