"""One continuation on its way: its tokens, its generator, its text, and why it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .requests import Piece
from .sampling import draw, score
from .text import Text
from .thinking import FEW, Thinking

if TYPE_CHECKING:
    from .jobs import Job


class Row:
    """Continuation `index` of a job's prompt."""

    def __init__(
        self,
        job: Job,
        index: int,
        tokenizer: PreTrainedTokenizerBase | None,
        ends: Collection[int],
        generator: torch.Generator,
    ) -> None:
        request = job.request
        self.job, self.index, self.generator, self.ends = job, index, generator, ends
        self.child = job.child  # who writes now
        self.tokens, self.num_prompt = list(request.tokens), len(request.tokens)
        self.counts: Counter[int] = Counter()
        self.forced: list[int] = []
        self.text = self.thinking = None
        if tokenizer is not None:
            self.text = Text(tokenizer, request.stop, request.keep_special)
            self.thinking = Thinking(tokenizer, request.tokens, request.thinking_budget, request.thinking_grace)
            self.forced = self.thinking.see([], 0) if request.thinking_budget == 0 else []
        self.may_switch = job.answer is not None
        self.finish_reason: str | None = None
        self.on_probation = False  # a batch with this row has failed: it runs alone until it has written a token

    def advance(self, logits: Tensor) -> Piece:
        """Write the next token, from logits (v) fp32.

        Raises:
            ArithmeticError: for NaN.
        """
        request = self.job.request
        if bool(logits.isnan().any()):
            raise ArithmeticError("the model computed NaN")
        token = self.forced.pop(0) if self.forced else None
        if token is None:
            token = draw(logits.clone(), request, self.counts, self.generator)
        scores = [] if request.logprobs is None else [score(logits, token, request.logprobs)]
        self.tokens.append(token)
        self.counts[token] += 1
        thinks = self.thinking is not None and self.thinking.open
        if self.thinking is not None:
            count = len(self.tokens) - self.num_prompt
            self.forced = self.forced or self.thinking.see(self.tokens[-min(count, FEW) :], count)
        is_end = token in self.ends and not request.ignore_eos
        text = "" if self.text is None or is_end else self.text.add(token)
        self._end(is_end)
        if self.finish_reason and self.text is not None:
            text += self.text.finish()
        end = self.text.tokenizer.decode([token]) if is_end and self.text is not None else ""
        return Piece(self.index, [token], text, scores, self.finish_reason, thinks, end)

    def switches(self) -> bool:
        """Whether the thinking has just ended, and another budget answers. Says so once."""
        if not self.may_switch or self.finish_reason or self.thinking is None or not self.thinking.closed:
            return False
        self.may_switch = False
        return True

    def _end(self, is_end: bool) -> None:
        if is_end or (self.text is not None and self.text.stopped):
            self.finish_reason = "stop"
        elif len(self.tokens) - self.num_prompt >= self.job.request.max_tokens:
            self.finish_reason = "length"
