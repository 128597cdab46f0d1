"""Long conversations out of short ones, with turns that refer back to earlier ones at random places.

The recipe of Nemotron-H's long-context fine-tuning (arXiv 2504.03624, alignment of the 8B; up to 512k tokens): shorter
conversations are put one after another up to a target length, and synthetic turns ask for something said before:
the answer is far back. A question is asked only if one earlier turn fits it.

The paper also spreads linked pieces of one topic over the conversation; that is not done here.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .bad_data import BadData
from .documents import Resumable, resumable

QUOTED_WORDS = 12
Message = Mapping[str, Any]


class Conversation(NamedTuple):
    """Messages, the tools that they may call, and where they stand."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    origin: str = "a conversation"


class Exchange(NamedTuple):
    """A question of the user in plain words, and the assistant's answer."""

    question: str
    answer: str


class LongConversations:
    """Iterates encoded long conversations; a new iterator continues there, and ends when the conversations do.

    Only conversations with the same tools are joined, and each must end with the assistant and the next begin with the
    user. What the chat template still refuses to have joined is left out, with a report for each conversation.

    Args:
        conversations: lists of messages (see chat.py), or mappings with `messages` and perhaps `tools` and `origin`, or
            pairs (source name, one of these); a Blend or other Resumable, or a list or dataset.
        encode: messages, and tools or None -> a mapping with `input_ids` and `labels`, such as `encode_conversation` with
            its tokenizer.
        target_tokens: length that is not exceeded. A conversation that alone is longer is left out, with a report.
        num_references: synthetic turns in each long conversation, as far as they fit.
        reference_share: of the target, kept free for them.
        seed: of places and questions.
        on_bad_data: "skip" (with count and warning) or "error".
    """

    def __init__(
        self,
        conversations: Resumable | Iterable[Any],
        encode: Callable[[Sequence[Message], Sequence[Any] | None], Mapping[str, list[int]]],
        target_tokens: int,
        num_references: int = 8,
        reference_share: float = 0.1,
        seed: int = 0,
        on_bad_data: str = "skip",
    ):
        for field, value, least in (("target_tokens", target_tokens, 1), ("num_references", num_references, 0)):
            if value < least:
                raise ValueError(f"{field}={value}: allowed is {least} or more")
        if not 0 <= reference_share < 1:
            raise ValueError(f"reference_share={reference_share}: allowed is 0 or more and less than 1")
        self.conversations = resumable(conversations)
        self.encode = encode
        self.target_tokens = target_tokens
        self.num_references = num_references
        self.reference_share = reference_share
        self.seed = seed
        self.bad = BadData("long conversations", on_bad_data)
        self._made = 0
        self._state = self.conversations.state_dict()
        self._at: int | None = None  # how far the rows were when the conversation after `_state` was taken
        self._filled = 0
        self._stream: Iterator[Mapping[str, list[int]]] | None = None

    @property
    def asks_filled(self) -> bool:
        """Whether the Blend that conversations come from asks how far the rows are."""
        return self.conversations.asks_filled

    def __iter__(self) -> Iterator[Mapping[str, list[int]]]:
        while (item := self.take()) is not None:
            yield item

    def take(self, filled: int = 0) -> Mapping[str, list[int]] | None:
        """The next long conversation, None after the last; `filled` as the Blend's."""
        self._filled, self._stream = filled, self._stream or self._long()
        if (item := next(self._stream, None)) is None:
            self._stream = None
        return item

    def _long(self) -> Iterator[Mapping[str, list[int]]]:
        self.conversations.load_state_dict(self._state)
        parts: list[Conversation] = []
        budget = round(self.target_tokens * (1 - self.reference_share))
        total, before = 0, self._state
        at = self._filled if self._at is None else self._at
        while (item := self.conversations.take(at)) is not None:
            conversation = _conversation_of(item)
            length = self._length(conversation)
            if length is not None:
                if parts and (total + length > budget or not _may_join(parts[-1], conversation)):
                    self._at = at
                    yield from self._finish(parts, total, before)
                    parts, total = [], 0
                parts, total = [*parts, conversation], total + length
            before, at = self.conversations.state_dict(), self._filled
        before, self._at = self.conversations.state_dict(), None
        if parts:
            yield from self._finish(parts, total, before)
        self._state = before

    def left_out(self) -> dict[str, dict[str, int]]:
        """As the Blend's that conversations come from, with those that could not be joined."""
        return {**self.conversations.left_out(), self.bad.source: dict(self.bad.counts)}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state after the last conversation handed out."""
        return {
            "conversations": self._state,
            "made": self._made,
            "at": self._at,
            "bad": dict(self.bad.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly after the conversations that `state` saw."""
        self._state, self._made = state["conversations"], state["made"]
        self._at, self._stream = state["at"], None
        self.bad.counts = Counter(state["bad"])

    def _tokens(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> int:
        return len(self.encode(messages, tools)["input_ids"])

    def _length(self, conversation: Conversation) -> int | None:
        """Tokens of a conversation, or None, with a report, for one that cannot be used."""
        try:
            length = self._tokens(conversation.messages, conversation.tools)
        except ValueError as error:
            return self.bad.report(conversation.origin, "cannot be encoded", str(error))
        if length > self.target_tokens:
            return self.bad.report(conversation.origin, "longer than target_tokens", f"{length} tokens")
        return length

    def _finish(
        self, parts: list[Conversation], total: int, state: dict[str, Any]
    ) -> Iterator[Mapping[str, list[int]]]:
        """The parts joined, or nothing, with a report of each, if the chat template refuses that."""
        generator = random.Random(f"{self.seed}/{self._made}")
        self._state, self._made = state, self._made + 1
        try:
            encoded = self._joined(parts, total, generator)
        except ValueError as error:
            for part in parts:
                self.bad.report(part.origin, "cannot be joined", str(error))
        else:
            yield encoded

    def _joined(self, parts: list[Conversation], total: int, generator: random.Random) -> Mapping[str, list[int]]:
        """The parts with as many references as fit."""
        joined, tools = join_conversations([part.messages for part in parts]), parts[0].tools
        if self.num_references:
            room = self.target_tokens - total
            encoded = self.encode(add_references(joined, self.num_references, generator, room, self._tokens), tools)
            if len(encoded["input_ids"]) <= self.target_tokens:
                return encoded
        return self.encode(joined, tools)


def join_conversations(parts: Sequence[Sequence[Message]]) -> list[Message]:
    """The messages of all parts; a system message after the first part becomes the beginning of the question after it."""
    joined: list[Message] = []
    for part in parts:
        system = None
        for message in part:
            if message["role"] == "system" and joined:
                system = None if message == joined[0] else message["content"]
            elif system is not None and message["role"] == "user":
                joined.append({**message, "content": _preceded(system, message["content"])})
                system = None
            else:
                joined.append(message)
    return joined


def add_references(
    messages: Sequence[Message],
    count: int,
    generator: random.Random,
    room: int,
    cost: Callable[[Sequence[Message]], int],
) -> list[Message]:
    """The messages with up to `count` exchanges more, each asking for something said before it.

    Args:
        generator: chooses places (after any plain answer), what is asked about, and how.
        room: tokens that all of them together may have.
        cost: tokens of a question with its answer.
    """
    messages = list(messages)
    places = [end for end in range(2, len(messages) + 1) if _exchange(messages, end) and _may_follow(messages, end)]
    places = set(generator.sample(places, min(count, len(places))))
    result: list[Message] = []
    known: list[Exchange] = []
    for end, message in enumerate(messages, 1):
        result.append(message)
        known += [exchange] if (exchange := _exchange(messages, end)) else []
        if end in places:
            turns = refer_back(known, result, generator)
            if (tokens := cost(turns)) <= room:
                result, room = result + turns, room - tokens
    return result


def refer_back(known: Sequence[Exchange], messages: Sequence[Message], generator: random.Random) -> list[Message]:
    """A question about one of the `known` exchanges of the messages so far, and its answer."""
    question, answer = generator.choice(known)
    asked, answered = _quote(question), _quote(answer)
    number = 1 + next(n for n, m in enumerate(m for m in messages if m["role"] == "user") if m["content"] == question)
    choices = [(f"What did I say in message number {number} of mine, counted from the beginning? Repeat it.", question)]
    if len({e.answer for e in known if _quote(e.question) == asked}) == 1:
        choices.append((f'Earlier I said: "{asked}" Repeat word for word what you answered.', answer))
    if len({e.question for e in known if _quote(e.answer) == answered}) == 1:
        choices.append((f'Which message of mine did you answer with: "{answered}" Repeat that message.', question))
    asks, says = generator.choice(choices)
    return [{"role": "user", "content": asks}, {"role": "assistant", "content": says}]


def _conversation_of(item: Any) -> Conversation:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        item = item[1]
    if not isinstance(item, Mapping):
        return Conversation(item)
    return Conversation(item["messages"], item.get("tools") or None, item.get("origin", "a conversation"))


def _may_join(first: Conversation, second: Conversation) -> bool:
    """Whether the second may follow the first as if it were the same conversation."""
    begins = next((message["role"] for message in second.messages if message["role"] != "system"), None)
    return first.tools == second.tools and first.messages[-1]["role"] == "assistant" and begins == "user"


def _exchange(messages: Sequence[Message], end: int) -> Exchange | None:
    """The question and answer that end before place `end`, if both are plain text."""
    if end < 2:
        return None
    asks, says = messages[end - 2], messages[end - 1]
    plain = isinstance(asks.get("content"), str) and isinstance(says.get("content"), str) and not says.get("tool_calls")
    if not plain or (asks["role"], says["role"]) != ("user", "assistant") or not says["content"].strip():
        return None
    return Exchange(asks["content"], says["content"])


def _may_follow(messages: Sequence[Message], end: int) -> bool:
    return end == len(messages) or messages[end]["role"] == "user"


def _quote(text: str) -> str:
    words = text.split()
    return " ".join(words[:QUOTED_WORDS]) + (" ..." if len(words) > QUOTED_WORDS else "")


def _preceded(system: str, content: Any) -> Any:
    """A question, plain or in parts, with the text before it."""
    return f"{system}\n\n{content}" if isinstance(content, str) else [{"type": "text", "text": system}, *content]
