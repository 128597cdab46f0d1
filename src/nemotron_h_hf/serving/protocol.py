"""OpenAI's requests: every field that has a meaning here, with its real meaning; any other is an error that names it.

A null asks for nothing, whatever the field. Types are strict: true is no number, and neither is "5".
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator

from .failures import Failure
from .requests import MOST_ALTERNATIVES

DEFAULT_TOKENS = 16  # of completions, OpenAI's
ALIASES = {
    "max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens", "thinking_token_budget": "thinking_budget",
}  # fmt: skip
"""Field of a body -> field of a `Request` that it is another name of."""


class Strict(BaseModel):
    """An object with these fields alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: it for name, it in data.items() if it is not None} if isinstance(data, dict) else data


class Function(Strict):
    """The name and arguments (JSON) of a tool call."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Strict):
    """One that the model made earlier in the conversation."""

    index: int | None = None  # in a stream
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class ToolFunction(Strict):
    """What a tool is called with."""

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    """One that the model may call."""

    type: Literal["function"]
    function: ToolFunction


AsGiven = WrapValidator(
    lambda value, check: (check(value), value)[1]
)  # chat templates see the order of a tool's fields


class TextPart(Strict):
    """A part of a message; pictures are not supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    annotations: list[Any] | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("allowed is a message with content")
        return self


class StreamOptions(Strict):
    """What a stream holds in addition."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Strict):
    """Text is the only one."""

    type: Literal["text"]


class Body(Strict):
    """What completions and conversations share."""

    model: str
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    budget: str | float | None = None
    thinking_token_budget: int | None = Field(None, ge=0, le=2**31)
    thinking_budget: int | None = None
    thinking_grace: int | None = None
    user: str | None = None  # names who asks, changes nothing

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError:  # JSON can say half of a pair of surrogates, UTF-8 cannot
                raise Failure(400, f"{name}: a letter is half of a surrogate pair: allowed is Unicode", name) from None
        return data

    @model_validator(mode="after")
    def _agrees(self) -> Body:
        for name, other in ALIASES.items():
            if {name, other} <= self.model_fields_set:
                raise Failure(400, f"{name}: allowed is it or {other}, not both", name)
        if self.stream_options is not None and not self.stream:
            raise Failure(400, "stream_options: allowed with stream=true alone", "stream_options")
        return self

    def settings(self) -> dict[str, Any]:
        """The fields of a `Request` that are given."""
        same = ("max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                "repetition_penalty", "logit_bias", "seed", "ignore_eos", "thinking_budget", "thinking_grace")  # fmt: skip
        given = {name: it for name, it in self if it is not None}
        found = {ALIASES.get(name, name): given[name] for name in (*same, *ALIASES) if name in given}
        if self.stop is not None:
            found["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return found

    def said_as(self) -> dict[str, str]:
        """Field of a `Request` -> its name in this body, where that differs."""
        return {other: name for name, other in ALIASES.items() if name in self.model_fields_set}


class CompletionBody(Body):
    """`/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, each text or tokens."""
        single = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if single else self.prompt


class ChatBody(Body):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    tools: list[Annotated[Tool, AsGiven]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    modalities: list[Literal["text"]] | None = None
    prompt_cache_key: str | None = None  # these two change nothing, like `user`
    safety_identifier: str | None = None
