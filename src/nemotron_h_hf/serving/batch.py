"""The running rows of one budget: a cache with their states next to each other, and one decode step of all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.cache import HybridCache
from .row import Row


class Batch:
    """Rows of different lengths, padded on the left. The last token of a row is not in the cache yet."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.rows = model, []  # rows: list[Row]
        self.cache: HybridCache | None = None

    def join(self, rows: Sequence[Row], cache: HybridCache) -> None:
        """Add rows that all continue from `cache`, of one row; it becomes the batch's."""
        if not rows:
            return
        parts = [cache] * len(rows) if self.cache is None else [self.cache, *[cache] * len(rows)]
        self.cache = HybridCache.join(parts) if len(parts) > 1 else cache
        self.rows += rows

    def step(self) -> Tensor:
        """Feed each row its last token: logits (rows, vocabulary), fp32."""
        device = self.model.device
        fed = torch.tensor([[row.tokens[-1]] for row in self.rows], device=device)
        lengths = torch.tensor([len(row.tokens) for row in self.rows], device=device)
        width = max(len(row.tokens) for row in self.rows)
        padded = any(len(row.tokens) < width for row in self.rows)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long() if padded else None
        return self.model(fed, cache=self.cache, attention_mask=mask, logits_to_keep=1).logits[:, -1].float()

    def take(self, row: Row) -> HybridCache:
        """The cache of one row alone, after all its tokens but the last."""
        return self.cache.take(self.rows.index(row), self._width() - len(row.tokens) + 1)

    def drop(self, gone: Collection[Row]) -> None:
        """Let rows go; as `take`, not between a step and the next token of the rows that stay."""
        stay = [index for index, row in enumerate(self.rows) if row not in gone]
        if len(stay) == len(self.rows):
            return
        width = self._width()
        self.rows = [self.rows[index] for index in stay]
        if self.rows:
            self.cache.keep(stay, drop=width - max(len(row.tokens) - 1 for row in self.rows))
        else:
            self.cache = None

    def _width(self) -> int:
        return int(self.cache.get_seq_length())
