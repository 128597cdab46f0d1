"""What is asked of the engine, checked once: a prompt, a budget, how to choose tokens, where to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import require

MOST_ALTERNATIVES = 20  # of the likeliest tokens at each place, OpenAI's limit
MOST_COPIES = 128


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, and `n` continuations of it.

    Args:
        tokens: ids of the prompt, at least one.
        budget: who answers, in any form that `resolve` takes; None is the parent.
        answer_budget: who goes on after the thinking (`</think>`); None is `budget`.
        max_tokens: new tokens of each continuation, at most.
        temperature: 0 takes the likeliest token.
        top_k, top_p, min_p: what is left to choose from: the k likeliest, a share of probability, a share of the likeliest
            token's probability; 0, 1 and 0 leave everything.
        repetition_penalty: of tokens in prompt or text, as in transformers; presence and frequency penalty: of tokens in the
            text, as OpenAI defines them.
        logit_bias: token id -> what is added to its logit.
        seed: continuation i is drawn with seed + i; None draws anew each time.
        stop: texts that end a continuation and are not part of it.
        ignore_eos: go on after an end token.
        logprobs: None, or how many of the likeliest tokens to report with each token; log-probabilities are the model's own,
            before temperature, penalties and bias.
        thinking_budget: tokens of thinking, if the prompt opens it, before its end is forced; None leaves it alone.
        thinking_grace: so many more tokens may pass until a line ends.
        keep_special: give special tokens in the text too, but for the one that ends it.
        marks: lengths of parts of the prompt that other prompts may share, such as the system message.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    tokens: Sequence[int]
    budget: Any = None
    answer_budget: Any = None
    max_tokens: int = 16
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    thinking_budget: int | None = None
    thinking_grace: int = 0
    keep_special: bool = False
    marks: Sequence[int] = ()

    def __post_init__(self) -> None:
        require(len(self.tokens) > 0, "prompt", list(self.tokens), "at least one token")
        self._check_counts()
        for name, low, high in (
            ("temperature", 0, 2), ("top_p", 0, 1), ("min_p", 0, 1), ("repetition_penalty", 0, 10),
            ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
        ):  # fmt: skip
            value = getattr(self, name)
            above = value > 0 if name in ("top_p", "repetition_penalty") else value >= low
            allowed = f"a number {'above' if name in ('top_p', 'repetition_penalty') else 'from'} {low} to {high}"
            require(math.isfinite(value) and above and value <= high, name, value, allowed)
        for token, bias in self.logit_bias.items():
            require(-100 <= bias <= 100, "logit_bias", {token: bias}, "a number from -100 to 100 for each token id")
        require(all(self.stop) and len(self.stop) <= 16, "stop", list(self.stop), "up to 16 texts, none empty")

    def _check_counts(self) -> None:
        limits = {"max_tokens": (1, 2**31), "n": (1, MOST_COPIES), "top_k": (0, 2**31), "thinking_grace": (0, 2**31)}
        optional = {
            "seed": (-(2**63), 2**63 - 2**10),
            "logprobs": (0, MOST_ALTERNATIVES),
            "thinking_budget": (0, 2**31),
        }
        for name, (low, high) in {**limits, **optional}.items():
            value = getattr(self, name)
            if value is not None or name in limits:
                whole = isinstance(value, int) and not isinstance(value, bool)
                require(whole and low <= value <= high, name, value, f"an integer from {low} to {high}")


@dataclass(frozen=True)
class TokenScore:
    """One written token: its log-probability (nats), and the likeliest tokens at its place with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Piece:
    """What one step added to continuation `index`. Text may lag behind the tokens: half letters and what may become a stop
    text are held back. The last piece has a `finish_reason`: "stop", or "length"."""

    index: int
    tokens: list[int]
    text: str
    scores: list[TokenScore]
    finish_reason: str | None = None
    thinking: bool = False  # whether the tokens are thought, not said
    end: str = ""  # the text of an end token, which is not part of `text`


@dataclass
class Answer:
    """A whole continuation."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None
    num_thinking_tokens: int = 0

    def add(self, piece: Piece) -> None:
        """One more piece."""
        self.tokens += piece.tokens
        self.text += piece.text
        self.scores += piece.scores
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.num_thinking_tokens += len(piece.tokens) * piece.thinking


class Busy(Exception):
    """The queue is full; `seconds` is when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full: try again in {seconds} s")
        self.seconds = seconds


class TooLarge(ValueError):
    """A request that can never fit."""


class Stopped(Exception):
    """The server ends before the request did."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")
