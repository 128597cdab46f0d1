"""`/v1/responses`, the part of it that needs no memory of the server: text in, text out, whole or in events. No tools."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from .answers import ChatWriter, chat_request
from .chat import Conversation, joined
from .engine import Engine
from .protocol import Body, Message, ResponseFormat, Strict
from .requests import Answer, Piece

PARTS = {"reasoning_content": ("reasoning", "reasoning_text"), "content": ("message", "output_text")}
"""Kind of a delta -> the item of the output that it belongs to, and the name of its text there."""


class Part(Strict):
    """A piece of an earlier message."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = Field(None, max_length=0)


class Item(Strict):
    """An earlier message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None


class TextOptions(Strict):
    """Plain text is the only form."""

    format: ResponseFormat | None = None


class ResponseBody(Body):
    """`/v1/responses`."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31)
    text: TextOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    max_tokens: None = None  # these have another form here, or none
    n: Literal[1] | None = None
    stream_options: None = None
    return_token_ids: Literal[False] | None = None

    def messages(self) -> list[Message]:
        """As those of a conversation."""
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        for item in self.input:
            text = item.content if isinstance(item.content, str) else "".join(part.text for part in item.content)
            messages.append(Message(role=item.role, content=text))
        return messages


class ResponseWriter(ChatWriter):
    """Writes a response: its items are the reasoning, if there is any, and the message."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.response_id, self.num_events = f"resp_{uuid.uuid4().hex}", 0
        self.items: list[dict[str, Any]] = []
        self.kind_now: str | None = None

    def begin(self) -> Iterator[dict[str, Any]]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def chunks(self, number: int, piece: Piece) -> Iterator[dict[str, Any]]:
        before = len(self.deltas[0])
        self.add(number, piece)
        for delta in self.deltas[0][before:]:
            ((kind, text),) = delta.items()
            if kind != self.kind_now:
                yield from self._close()
                yield from self._open(kind)
            self.items[-1]["content"][0]["text"] += text
            yield self._about(f"response.{PARTS[kind][1]}.delta", delta=text)

    def end(self, num_cached: int) -> Iterator[dict[str, Any]]:
        yield from self._close()
        response = self.whole(num_cached)
        yield self._event(f"response.{response['status']}", response=response)

    def whole(self, num_cached: int) -> dict[str, Any]:
        if not self.body.stream:
            message = joined(self.deltas[0])
            self.items = [self._item(kind, message[kind]) for kind in PARTS if kind in message]
        read, written = len(self.requests[0].tokens), len(self.answers[0].tokens)
        usage = {
            "input_tokens": read, "input_tokens_details": {"cached_tokens": num_cached}, "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": self.answers[0].num_thinking_tokens}, "total_tokens": read + written,
        }  # fmt: skip
        return self._response("incomplete" if _is_cut(self.answers[0]) else "completed", usage)

    def _response(self, status: str, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        request, body = self.requests[0], self.body
        return {
            "id": self.response_id, "object": "response", "created_at": self.head["created"], "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None, "model": body.model,
            "output": list(self.items), "usage": usage, "instructions": body.instructions, "metadata": body.metadata or {},
            "max_output_tokens": body.max_output_tokens, "temperature": request.temperature, "top_p": request.top_p,
            "tools": [], "tool_choice": "none", "parallel_tool_calls": False, "store": False, "truncation": "disabled",
        }  # fmt: skip

    def _open(self, kind: str) -> Iterator[dict[str, Any]]:
        self.kind_now = kind
        self.items.append(self._item(kind, "", "in_progress"))
        yield self._event(
            "response.output_item.added", output_index=len(self.items) - 1, item={**self.items[-1], "content": []}
        )
        yield self._about("response.content_part.added", part=dict(self.items[-1]["content"][0]))

    def _close(self) -> Iterator[dict[str, Any]]:
        if self.kind_now is None:
            return
        item, name = self.items[-1], PARTS[self.kind_now][1]
        item["status"] = "incomplete" if _is_cut(self.answers[0]) else "completed"
        yield self._about(f"response.{name}.done", text=item["content"][0]["text"])
        yield self._about("response.content_part.done", part=item["content"][0])
        yield self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _item(self, kind: str, text: str, status: str | None = None) -> dict[str, Any]:
        item, name = PARTS[kind]
        status = status or ("incomplete" if _is_cut(self.answers[0]) else "completed")
        part = {"type": name, "text": text}
        if kind == "content":
            return {"type": item, "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": status,
                    "content": [{**part, "annotations": [], "logprobs": []}]}  # fmt: skip
        return {"type": item, "id": f"rs_{uuid.uuid4().hex}", "status": status, "summary": [], "content": [part]}

    def _about(self, name: str, **more: Any) -> dict[str, Any]:
        """An event about the text of the last item."""
        more |= {"logprobs": []} if ".output_text." in name else {}
        return self._event(
            name, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, content_index=0, **more
        )

    def _event(self, name: str, **more: Any) -> dict[str, Any]:
        self.num_events += 1
        return {"type": name, "sequence_number": self.num_events - 1, **more}


def _is_cut(answer: Answer) -> bool:
    return answer.finish_reason == "length"


def response_writer(engine: Engine, body: ResponseBody, budgets: tuple[Any, Any]) -> ResponseWriter:
    """Of `/v1/responses`."""
    conversation = Conversation(engine.tokenizer, body.messages(), None, body.chat_template_kwargs)
    if conversation.template is not None:  # without tools there are no calls
        fields = {name: it for name, it in conversation.template["fields"].items() if name != "tool_calls"}
        conversation.template = {**conversation.template, "fields": fields}
    return ResponseWriter(body, engine.tokenizer, [chat_request(engine, body, budgets, conversation)], conversation)
