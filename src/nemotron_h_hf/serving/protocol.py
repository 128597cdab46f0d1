"""OpenAI's requests: every field that has a meaning here, with its real meaning; any other is an error that names it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NOTHING = "what a client may send that asks for nothing"
DEFAULT_TOKENS = 16  # of completions, OpenAI's


class Function(BaseModel):
    """The name and arguments (JSON) of a tool call."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(BaseModel):
    """One that the model made earlier in the conversation."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class TextPart(BaseModel):
    """A part of a message; pictures are not supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Literal[None] = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: Literal[None] = None
    function_call: Literal[None] = None


class StreamOptions(BaseModel):
    """What a stream holds in addition."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(BaseModel):
    """Text is the only one."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class Body(BaseModel):
    """What completions and conversations share."""

    model_config = ConfigDict(extra="forbid")
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
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    budget: str | float | None = None
    thinking_token_budget: int | None = None
    thinking_budget: int | None = None
    thinking_grace: int | None = None
    user: str | None = None  # names who asks, changes nothing

    def settings(self) -> dict[str, Any]:
        """The fields of a `Request` that are given."""
        same = ("max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                "repetition_penalty", "logit_bias", "seed", "ignore_eos", "thinking_budget", "thinking_grace")  # fmt: skip
        found = {name: getattr(self, name) for name in same if getattr(self, name) is not None}
        if self.thinking_token_budget is not None:
            found["thinking_budget"] = self.thinking_token_budget
        if self.stop is not None:
            found["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return found


class CompletionBody(Body):
    """`/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: Literal[False] | None = None
    suffix: Literal[None] = None
    best_of: Literal[1] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, each text or tokens."""
        single = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if single else self.prompt


class ChatBody(Body):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    modalities: list[Literal["text"]] | None = None
