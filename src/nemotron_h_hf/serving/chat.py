"""Conversations: messages to a prompt by the tokenizer's chat template, and the text that comes back to deltas.

Reasoning and tool calls are found by transformers' parser with the tokenizer's `response_template`; of tokenizers without
one, the template is taken that fits their chat template (tokenizer_files.py). With neither, everything is content.
"""

from __future__ import annotations

import inspect
import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import require
from ..tokenizer_files import response_template_for
from .protocol import Message

PAST_THE_END = "\x00"  # parsers take what may go on for ended when more follows
CAN_PARSE = "get_response_parser" in vars(PreTrainedTokenizerBase)  # not in older transformers


def response_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The tokenizer's own, or the one that fits its chat template; None if there is neither, or no parser for it."""
    if not CAN_PARSE:
        return None
    return tokenizer.response_template or response_template_for(tokenizer.chat_template)


class Conversation:
    """A prompt of messages: `text`, `tokens`, and `marks` where a part ends that later prompts may share.

    Raises:
        ValueError: if the tokenizer has no chat template, the template refuses, or tools cannot be read back.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.tools, self.options = tokenizer, tools or None, options or {}
        self.template = response_template(tokenizer)
        require(
            bool(tokenizer.chat_template),
            "messages",
            "a conversation",
            "/v1/completions: the model has no chat template",
        )
        require(
            not tools or self.template is not None,
            "tools",
            len(tools or ()),
            "none: the model has no response template",
        )
        self._check_options()
        plain = [_plain(message) for message in messages]
        if "developer" not in str(tokenizer.chat_template):  # most know the older name alone, and pass over others
            plain = [it | {"role": "system"} if it["role"] == "developer" else it for it in plain]
        self.text = self._render(plain, add_generation_prompt=True)
        self.tokens = self._encode(self.text)
        self.marks = [mark for mark in map(self._mark, self._parts(plain)) if mark]

    def reader(self) -> Reader:
        """Reads one answer, with transformers' parser if there is a response template."""
        if self.template is None:
            return Reader(None)
        calls = self.template["fields"].get("tool_calls", {})
        parser = self.tokenizer.get_response_parser(self.template, prefix=self.text, tools=self.tools)
        return Reader(parser, calls_end="close" in calls or "close_pattern" in calls)

    def _check_options(self) -> None:
        """A client may set what the chat template reads, not the template or how it is used."""
        own = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}
        for name in self.options:
            read = re.search(rf"\b{re.escape(name)}\b", str(self.tokenizer.chat_template))
            allowed = "variables that the chat template reads, but for its own arguments"
            require(bool(read) and name not in own, "chat_template_kwargs", name, allowed)

    def _render(self, messages: list[dict], **options: Any) -> str:
        try:
            options = {"tools": self.tools, **options, **self.options}
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise errors of Jinja
            raise ValueError(f"messages: the chat template refuses them: {error}") from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _parts(self, messages: list[dict]) -> list[str]:
        """The system message, and all but the last message, rendered."""
        counts = {1 if messages[0]["role"] in ("system", "developer") else 0, len(messages) - 1} - {0}
        parts = []
        for count in sorted(counts):
            try:
                parts.append(self._render(messages[:count]))
            except ValueError:  # a template may refuse a conversation that ends there
                continue
        return parts

    def _mark(self, part: str) -> int:
        tokens = self._encode(part) if self.text.startswith(part) else []
        return len(tokens) if self.tokens[: len(tokens)] == tokens else 0


class Reader:
    """Reads one answer as it comes, into OpenAI's deltas.

    Args:
        calls_end: whether the template says how a tool call ends; one that does not is shown as text.
    """

    def __init__(self, parser: Any, calls_end: bool = True) -> None:
        self.parser, self.calls_end, self.num_calls = parser, calls_end, 0
        self.said: set[str] = set()
        self.hidden, self.in_call = "", False  # what the parser was given and has not shown

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The deltas of more text."""
        deltas: list[dict[str, Any]] = []
        for place, letter in enumerate(text):  # one by one: a failure loses what it was given
            if self.parser is None:
                return [*deltas, {"content": text[place:]}]
            self.hidden += letter
            try:
                deltas += self._deltas(self.parser.feed(letter))
            except (ValueError, KeyError):
                deltas += self._give_up()
        return _merged(deltas)

    def finish(self, end: str = "") -> list[dict[str, Any]]:
        """The deltas of what was held back; `end` is the text of the end token, which the template may need."""
        if self.parser is None:
            return []
        is_whole = bool(end) and self.in_call and not self.calls_end
        deltas = [] if is_whole else self.feed(end + PAST_THE_END)
        if self.parser is not None and self.in_call and not is_whole:
            deltas += self._give_up()
        elif self.parser is not None:
            try:
                deltas += self._deltas(self.parser.finalize()[1])
            except (ValueError, KeyError):
                deltas += self._give_up()
        return _without_end(_merged(deltas), end)

    def _give_up(self) -> list[dict[str, Any]]:
        """A tool call that is none is shown as it is, and all that follows."""
        self.parser = None
        return [{"content": self.hidden}] if self.hidden else []

    def _deltas(self, events: list[dict]) -> list[dict[str, Any]]:
        deltas = []
        for event in events:
            name, kind = event["field"], event["type"]
            if name == "tool_calls":
                self.in_call = kind != "region_close"
            elif kind == "region_chunk":
                self.hidden = self.hidden.partition(event["text"])[2]
                text = event["text"] if name in self.said else event["text"].lstrip("\n")
                if text:
                    self.said.add(name)
                    deltas.append({name: text})
            elif len(events) == 1:  # only a tag
                self.hidden = ""
            if name == "tool_calls" and kind == "region_close":
                self.hidden = ""
                calls = event["value"] if isinstance(event["value"], list) else [event["value"]]
                deltas.append({"tool_calls": [self._call(call["function"]) for call in calls]})
        return deltas

    def _call(self, function: dict[str, Any]) -> dict[str, Any]:
        self.num_calls += 1
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {
            "index": self.num_calls - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }  # fmt: skip


def _merged(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours of one kind of text as one."""
    merged: list[dict[str, Any]] = []
    for delta in deltas:
        ((name, value),) = delta.items()
        if merged and name in merged[-1] and name != "tool_calls":
            merged[-1][name] += value
        else:
            merged.append(delta)
    return merged


def _without_end(deltas: list[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """Without the end token, if the template took it for text."""
    if deltas and "tool_calls" not in deltas[-1]:
        ((name, text),) = deltas.pop().items()
        text = text.removesuffix(PAST_THE_END).removesuffix(end)
        deltas += [{name: text}] if text else []
    return deltas


def joined(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that deltas make."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for delta in deltas:
        for name, value in delta.items():
            if name == "tool_calls":
                calls = [{key: part for key, part in call.items() if key != "index"} for call in value]
                message.setdefault("tool_calls", []).extend(calls)
            else:
                message[name] = (message.get(name) or "") + value
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message


def _plain(message: Message) -> dict[str, Any]:
    """As chat templates want it: text as one string, arguments as objects."""
    plain = message.model_dump(exclude_none=True, exclude={"annotations"})
    if isinstance(message.content, list):
        plain["content"] = "".join(part.text for part in message.content)
    plain.setdefault("content", "")
    for call in plain.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            call["function"]["arguments"] = _object(arguments or "{}")
    return plain


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    require(isinstance(value, dict), "messages.tool_calls.function.arguments", text, "a JSON object")
    return value
