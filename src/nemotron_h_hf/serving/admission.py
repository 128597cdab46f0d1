"""Whether a request's caches fit: every running row is counted as long as it may become.

Rows of one budget lie in one tensor, padded to the longest, with room to grow by a quarter: a batch of r rows takes

    r * (states + 1.25 * longest * bytes of keys and values per token)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cost import cache_bytes, kv_bytes_per_token
from ..elastic.budgets import Budget
from ..model.configuration_nemotron_h import NemotronHConfig

if TYPE_CHECKING:
    from .engine import Job

GROWTH = 1.25  # of memory for keys and values, cache.py


class Room:
    """`limit` bytes for the caches of running rows, in a dtype; states are fp32."""

    def __init__(self, limit: int, dtype: str) -> None:
        self.limit, self.dtype = limit, dtype.removeprefix("torch.")
        self._jobs: dict[Job, list[tuple[Budget, NemotronHConfig]]] = {}
        self._reserved = 0

    def enter(self, job: Job) -> None:
        """Count a job's rows."""
        self._jobs[job] = _models(job)
        self._reserved = self._bytes(self._jobs)

    def leave(self, job: Job) -> None:
        """Count them no more."""
        del self._jobs[job]
        self._reserved = self._bytes(self._jobs)

    def reserved(self) -> int:
        """Bytes that running rows may come to take."""
        return self._reserved

    def fits(self, job: Job) -> bool:
        """Whether one more job can run now."""
        return self._bytes({**self._jobs, job: _models(job)}) <= self.limit

    def alone(self, job: Job) -> int:
        """Bytes of a job that runs alone."""
        return self._bytes({job: _models(job)})

    def _bytes(self, jobs: dict[Job, list[tuple[Budget, NemotronHConfig]]]) -> int:
        batches: dict[Budget, tuple[NemotronHConfig, int, int]] = {}
        for job, models in jobs.items():
            length = len(job.request.tokens) + job.request.max_tokens
            for budget, config in models:
                _, rows, longest = batches.get(budget, (config, 0, 0))
                batches[budget] = (config, rows + job.request.n, max(longest, length))
        return sum(rows * self._row(config, longest) for config, rows, longest in batches.values())

    def _row(self, config: NemotronHConfig, length: int) -> int:
        keys = kv_bytes_per_token(config, self.dtype) * length
        return cache_bytes(config, 0, self.dtype) + round(GROWTH * keys)


def _models(job: Job) -> list[tuple[Budget, NemotronHConfig]]:
    """The budgets that a job's rows run in, one after the other."""
    children = [job.child] if job.answer in (None, job.child) else [job.child, job.answer]
    return [(child.budget, child.config) for child in children]
