"""Where thinking ends: seen in the text, or forced when its budget is spent.

The budget counts only if the prompt opens the thinking. Once so many tokens are written, thinking ends at the next token that
ends a line, or after `grace` more tokens: the end's tokens are then written one by one (NVIDIA's rule; without grace it is
vLLM's `thinking_token_budget`).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<think>", "</think>"
FEW = 16  # tokens that hold either of them, and the line ends around it


class Thinking:
    """Follows one row. `open` says that it thinks now, `closed` that it has thought."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], budget: int | None, grace: int = 0
    ) -> None:
        self.tokenizer, self.grace = tokenizer, grace
        before = tokenizer.decode(list(prompt[-FEW:])).rstrip()
        self.open, self.closed = before.endswith(OPEN), before.endswith(CLOSE)
        self.budget = budget if self.open else None

    def see(self, written: Sequence[int], count: int) -> list[int]:
        """After a token: the tokens that must be written next, most often none.

        Args:
            written: the last `FEW` tokens that were written, fewer at the beginning.
            count: how many there are in all.
        """
        if self.closed:
            return []
        last = self.tokenizer.decode(list(written[-1:]))
        if ">" in last:  # both tags end with it
            tail = self.tokenizer.decode(list(written))
            self.open, self.closed = self.open or tail.rstrip().endswith(OPEN), CLOSE in tail
        if self.closed:
            self.open = False
        elif self.budget is not None and count >= self.budget:
            if last.endswith("\n") or count >= self.budget + self.grace:
                self.budget = None
                return self.tokenizer.encode(f"\n{CLOSE}", add_special_tokens=False)
        return []
