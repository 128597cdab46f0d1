"""Pieces as OpenAI's answers: whole, or in chunks; of completions and of conversations."""

from __future__ import annotations

import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import require
from .chat import Conversation, joined
from .engine import Engine
from .protocol import DEFAULT_TOKENS, Body, ChatBody, CompletionBody
from .requests import Answer, Piece, Request, TokenScore
from .text import token_bytes, token_text


class Writer:
    """Writes the answer to one body. Choice i * n + j is continuation j of prompt i."""

    kind = ("cmpl", "text_completion", "text_completion")

    def __init__(self, body: Body, tokenizer: PreTrainedTokenizerBase, requests: list[Request]) -> None:
        self.body, self.tokenizer, self.requests = body, tokenizer, requests
        self.copies = requests[0].n
        self.answers = [Answer() for request in requests for _ in range(request.n)]
        self.special = {token for token, it in tokenizer.added_tokens_decoder.items() if it.special}
        self.places = [Place() for _ in self.answers]
        self.head = {"id": f"{self.kind[0]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def begin(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first token."""
        yield from ()

    def add(self, number: int, piece: Piece) -> int:
        """Take a piece of request `number`; the index of its choice."""
        index = number * self.copies + piece.index
        self.answers[index].add(piece)
        return index

    def chunks(self, number: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunks that a piece makes."""
        index = self.add(number, piece)
        choice = {
            "index": index,
            "text": piece.text,
            "logprobs": self.logprobs(index, piece.scores),
            "finish_reason": piece.finish_reason,
        }
        if piece.text or piece.finish_reason or piece.scores or self.body.return_token_ids:
            yield self._chunk(choice, piece)

    def end(self, num_cached: int) -> Iterator[dict[str, Any]]:
        """Chunks after the last token."""
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield {**self.head, "object": self.kind[2], "choices": [], "usage": self.usage(num_cached)}

    def whole(self, num_cached: int) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = [self.choice(index, answer) for index, answer in enumerate(self.answers)]
        if self.body.return_token_ids:
            for choice, answer in zip(choices, self.answers):
                choice["token_ids"] = answer.tokens
            prompts = {"prompt_token_ids": list(self.requests[0].tokens)}
        else:
            prompts = {}
        return {**self.head, "object": self.kind[1], "choices": choices, "usage": self.usage(num_cached), **prompts}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One whole choice."""
        return {
            "index": index, "text": answer.text, "logprobs": self.logprobs(index, answer.scores),
            "finish_reason": answer.finish_reason,
        }  # fmt: skip

    def usage(self, num_cached: int) -> dict[str, Any]:
        """Tokens read and written."""
        read = sum(len(request.tokens) for request in self.requests)
        written = sum(len(answer.tokens) for answer in self.answers)
        thought = sum(answer.num_thinking_tokens for answer in self.answers)
        return {
            "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": num_cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }  # fmt: skip

    def logprobs(self, index: int, scores: list[TokenScore]) -> dict[str, Any] | None:
        """OpenAI's form for completions, of the next tokens of a choice. The token itself is among the likeliest."""
        if self.requests[0].logprobs is None:
            return None
        return {
            "tokens": [self._token(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [
                {self._token(token): logprob for token, logprob in (*score.top, (score.token, score.logprob))}
                for score in scores
            ],
            "text_offset": [self.places[index].after(self._shown(score.token)) for score in scores],
        }  # fmt: skip

    def _chunk(self, choice: dict[str, Any], piece: Piece) -> dict[str, Any]:
        if self.body.return_token_ids:
            choice["token_ids"] = piece.tokens
        chunk = {**self.head, "object": self.kind[2], "choices": [choice]}
        options = self.body.stream_options
        return {**chunk, "usage": None} if options is not None and options.include_usage else chunk

    def _shown(self, token: int) -> bytes:
        return b"" if token in self.special else token_bytes(self.tokenizer, token)

    def _token(self, token: int) -> str:
        return token_text(token_bytes(self.tokenizer, token))


class Place:
    """Letters before the next token."""

    def __init__(self) -> None:
        self.letters, self.decoder = 0, getincrementaldecoder("utf-8")("replace")

    def after(self, token: bytes) -> int:
        """Where this token begins; the next one is after it."""
        begins, self.letters = self.letters, self.letters + len(self.decoder.decode(token))
        return begins


class ChatWriter(Writer):
    """The same for a conversation, whose answer is read into content, reasoning and tool calls."""

    kind = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def __init__(
        self, body: Body, tokenizer: PreTrainedTokenizerBase, requests: list[Request], conversation: Conversation
    ) -> None:
        super().__init__(body, tokenizer, requests)
        self.readers = [conversation.reader() for _ in self.answers]
        self.deltas: list[list[dict[str, Any]]] = [[] for _ in self.answers]

    def begin(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.answers)):
            choice = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            yield self._chunk(choice, Piece(index, [], "", []))

    def add(self, number: int, piece: Piece) -> int:
        index = super().add(number, piece)
        self.deltas[index] += self._read(index, piece)
        return index

    def chunks(self, number: int, piece: Piece) -> Iterator[dict[str, Any]]:
        index = number * self.copies + piece.index
        before = len(self.deltas[index])
        self.add(number, piece)
        deltas = self.deltas[index][before:] or [{}] * bool(piece.scores or self.body.return_token_ids)
        for place, delta in enumerate(deltas):
            scores = piece.scores if place == 0 else []
            choice = {"index": index, "delta": delta, "logprobs": self.logprobs(index, scores), "finish_reason": None}
            yield self._chunk(choice, piece if place == 0 else Piece(index, [], "", []))
        if piece.finish_reason:
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": self._reason(index)}
            yield self._chunk(choice, Piece(index, [], "", []))

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index, "message": joined(self.deltas[index]), "logprobs": self.logprobs(index, answer.scores),
            "finish_reason": self._reason(index),
        }  # fmt: skip

    def logprobs(self, index: int, scores: list[TokenScore]) -> dict[str, Any] | None:
        """OpenAI's form for conversations."""
        if self.requests[0].logprobs is None:
            return None
        content = [
            {**self._scored(score.token, score.logprob), "top_logprobs": [self._scored(*one) for one in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self.tokenizer, token)
        return {"token": token_text(data), "logprob": logprob, "bytes": list(data)}

    def _read(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        reader = self.readers[index]
        deltas = reader.feed(piece.text)
        return deltas + reader.finish(piece.end) if piece.finish_reason else deltas

    def _reason(self, index: int) -> str | None:
        reason = self.answers[index].finish_reason
        return "tool_calls" if reason == "stop" and self.readers[index].num_calls else reason


def completion_writer(engine: Engine, body: CompletionBody, budgets: tuple[Any, Any]) -> Writer:
    """Of `/v1/completions`."""
    settings = {"max_tokens": DEFAULT_TOKENS, **body.settings(), "budget": budgets[0], "answer_budget": budgets[1]}
    prompts = body.prompts()
    require(len(prompts) > 0, "prompt", prompts, "one prompt or more")
    most = max(1, engine.queue)
    require(len(prompts) <= most, "prompt", f"{len(prompts)} prompts", f"at most {most}, the requests that may wait")
    read = [engine.tokenizer(it)["input_ids"] if isinstance(it, str) else it for it in prompts]
    first = Request(tokens=read[0], logprobs=body.logprobs, **settings)
    return Writer(body, engine.tokenizer, [_another(first, i, tokens) for i, tokens in enumerate(read)])


def _another(first: Request, number: int, tokens: list[int]) -> Request:
    """The same for prompt `number`: choice i of all of them is drawn with seed + i."""
    seed = None if first.seed is None else first.seed + number * first.n
    return replace(first, tokens=tokens, seed=seed)


def chat_writer(engine: Engine, body: ChatBody, budgets: tuple[Any, Any]) -> ChatWriter:
    """Of `/v1/chat/completions`."""
    tools = None if body.tool_choice == "none" else body.tools
    conversation = Conversation(engine.tokenizer, body.messages, tools, body.chat_template_kwargs)
    require(
        body.top_logprobs is None or bool(body.logprobs), "top_logprobs", body.top_logprobs, "None without logprobs"
    )
    request = chat_request(engine, body, budgets, conversation)
    request = replace(request, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    return ChatWriter(body, engine.tokenizer, [request], conversation)


def chat_request(engine: Engine, body: Body, budgets: tuple[Any, Any], conversation: Conversation) -> Request:
    """What is asked of the engine. Without a limit, an answer may fill the context."""
    return Request(
        tokens=conversation.tokens,
        budget=budgets[0],
        answer_budget=budgets[1],
        keep_special=conversation.template is not None,
        marks=conversation.marks,
        **{"max_tokens": max(1, engine.max_context - len(conversation.tokens)), **body.settings()},
    )
