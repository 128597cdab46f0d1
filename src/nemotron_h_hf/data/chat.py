"""Conversations to token ids and labels: the chat template's own text, with a loss on what the assistant writes.

    text    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    loss                                                          ^^^^^^^^^^^^^^^

The places of assistant turns come from the template: from its {% generation %} marks if it has them, otherwise from rendering
with something else in the assistant's place, and where a turn is more than words (tool calls) from rendering the
conversation up to each turn, which must give the beginning of the whole text. Token ids are those of
`tokenizer.apply_chat_template(messages)`, cut where a prompt ends.

The model must also learn to stop. Rendering a probe finds the end of a turn: the first added token after the assistant's
words. Some templates write none (Nemotron-H's own ends a turn with a line break). Then the token that opens the next turn
ends the turn: it counts for the loss, and one is added after the last turn.
"""

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

IGNORED = -100
PROBE = [{"role": "user", "content": "7Q7"}, {"role": "assistant", "content": "8A8"}]
Message = Mapping[str, Any]
Render = Callable[..., str]


class TurnEnd(NamedTuple):
    """The token that ends an assistant turn, and whether the template itself puts it after the turn."""

    token_id: int | None
    written: bool


def encode_conversation(
    messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None = None
) -> dict[str, list[int]]:
    """Token ids and labels of a conversation; labels are -100 but for assistant turns, their end included.

    Args:
        messages: `{"role", "content"}`, with `tool_calls` and anything else the template reads.
        tokenizer: a fast tokenizer of transformers with a chat template.
        tools: as for `apply_chat_template`.

    Returns:
        `input_ids` and `labels`, of the same length; labels are not shifted.

    Raises:
        ValueError: for messages the template refuses, without an assistant turn, or if the template renders earlier turns
            otherwise once later ones follow and has no {% generation %} marks.
    """
    check_messages(messages)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}: allowed is a fast tokenizer, which knows offsets")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    render = _renderer(tokenizer, tools)
    text = render(messages)
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(None, tools)):
        spans = _marked_spans(messages, tokenizer, tools)
    else:
        spans = _spans_by_stand_ins(messages, render, text)
        spans = _spans_by_beginnings(messages, render, text) if spans is None else spans
    ids, runs = _token_runs(text, spans, tokenizer)
    end = turn_end(tokenizer, tools)
    labels = [IGNORED] * len(ids)
    for first, stop in runs:
        stop = _with_end(ids, first, stop, end, tokenizer)
        labels[first:stop] = ids[first:stop]
    if runs and messages[-1]["role"] == "assistant" and not end.written and end.token_id is not None:
        ids, labels = [*ids, end.token_id], [*labels, end.token_id]
    return {"input_ids": ids, "labels": labels}


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is no conversation with something to learn.

    Raises:
        ValueError: naming the message and the field.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={str(messages)[:80]!r}: allowed is a list of mappings with role and content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} is {str(message)[:80]!r}: allowed is a mapping with role and content")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise ValueError(f"message {number}: content={message.get('content')!r}: allowed is text")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("messages have no assistant turn, so there is nothing to learn")


def turn_end(tokenizer: Any, tools: Sequence[Any] | None = None) -> TurnEnd:
    """What ends an assistant turn under the tokenizer's template."""
    render = _renderer(tokenizer, tools)
    tail = render(PROBE).rpartition("8A8")[2]
    token = _first_added(tail, tokenizer)
    if token is not None:
        return TurnEnd(token, True)
    longer = render([*PROBE, {"role": "user", "content": "9Q9"}])
    token = _first_added(longer.rpartition("8A8")[2].partition("9Q9")[0], tokenizer)
    return TurnEnd(tokenizer.eos_token_id if token is None else token, False)


def _renderer(tokenizer: Any, tools: Sequence[Any] | None) -> Render:
    """messages, add_generation_prompt -> text; what the template refuses is a ValueError."""

    def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        if tokenizer.chat_template is None:
            raise ValueError("chat_template=None: allowed is a file with one, since the tokenizer has none")
        try:
            return tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    return render


def _spans_by_stand_ins(messages: Sequence[Message], render: Render, text: str) -> list[tuple[int, int]] | None:
    """Characters of each assistant turn, found by rendering once with numbers in place of the assistant's words.

    None where the words are not all that a turn consists of, or the text is not what is expected around them.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if any(set(messages[n]) != {"role", "content"} or not isinstance(messages[n]["content"], str) for n in turns):
        return None
    stand_ins = {n: {**messages[n], "content": f"\ue000{n}\ue001"} for n in turns}
    rendered = render([stand_ins.get(number, message) for number, message in enumerate(messages)])
    pieces = re.split("\ue000(\\d+)\ue001", rendered)
    if pieces[1::2] != [str(n) for n in turns]:
        return None
    header = render(PROBE[:1], True).removeprefix(render(PROBE[:1]))
    tail = render(PROBE).rpartition(PROBE[1]["content"])[2]
    spans, before, place = [], pieces[0], len(pieces[0])
    for number, after in zip(turns, pieces[2::2]):
        content = messages[number]["content"]
        fits = (words for words in (content, content.strip()) if text.startswith(words + after, place))
        words = next(fits, None)
        if words is None or not before.endswith(header) or not after.startswith(tail):
            return None
        spans.append((place, place + len(words) + len(tail)))
        before, place = after, place + len(words) + len(after)
    return spans if text.startswith(pieces[0]) and place == len(text) else None


def _spans_by_beginnings(messages: Sequence[Message], render: Render, text: str) -> list[tuple[int, int]]:
    """Characters of each assistant turn, header left out, found by rendering up to each: slow for hundreds of turns."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise ValueError("the conversation begins with an assistant turn, and the template has no {% generation %}")
        turn = text if number + 1 == len(messages) else render(messages[: number + 1])
        earlier = render(messages[:number])
        if not (text.startswith(turn) and turn.startswith(earlier)):
            raise ValueError(
                f"the chat template renders messages 1 to {number + 1} otherwise once later ones follow, so what the "
                "assistant wrote cannot be told from the rest; put {% generation %} and {% endgeneration %} around the "
                "assistant's words in the template"
            )
        spans.append((_start_of_words(earlier, render(messages[:number], True), turn), len(turn)))
    return spans


def _start_of_words(earlier: str, prompt: str, turn: str) -> int:
    """Where the header of a turn ends: with the generation prompt, or at the last line break that it shares."""
    if turn.startswith(prompt):
        return len(prompt)
    shared = os.path.commonprefix([prompt, turn])
    start = shared.rfind("\n") + 1
    if start <= len(earlier):
        raise ValueError(
            f"the chat template's generation prompt {prompt[len(earlier) :]!r} is not how it begins an assistant turn, "
            f"{turn[len(earlier) :][:40]!r}; put {{% generation %}} marks into the template"
        )
    return start


def _marked_spans(messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any] | None) -> list[tuple[int, int]]:
    """The characters that the template's {% generation %} marks cover."""
    _, spans = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=tokenizer.get_chat_template(None, tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    spans = [(start, stop) for start, stop in spans[0] if start < stop]
    if not spans:
        raise ValueError("the chat template's {% generation %} marks cover nothing of the conversation")
    return spans


def _token_runs(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of the text, and for each span of characters the tokens [first, stop) that hold any of it.

    A token that would hold the end of a prompt and the beginning of the answer is taken apart: a model that generates
    starts after the whole prompt.
    """
    ids, starts, ends = _tokens(text, [0, len(text)], tokenizer)
    cuts = [start for start, _ in spans if _holds_both(starts, ends, start)]
    if cuts:
        ids, starts, ends = _tokens(text, [0, *cuts, len(text)], tokenizer)
    return ids, [(bisect_right(ends, start), bisect_left(starts, stop)) for start, stop in spans]


def _tokens(text: str, cuts: list[int], tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Ids of the pieces between the cuts, and the first and last character of each token."""
    ids, starts, ends = [], [], []
    for begin, stop in zip(cuts, cuts[1:]):
        encoded = tokenizer(text[begin:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += encoded["input_ids"]
        starts += [begin + start for start, _ in encoded["offset_mapping"]]
        ends += [begin + end for _, end in encoded["offset_mapping"]]
    return ids, starts, ends


def _holds_both(starts: list[int], ends: list[int], place: int) -> bool:
    token = bisect_right(ends, place)
    return token < len(starts) and starts[token] < place


def _with_end(ids: list[int], first: int, stop: int, end: TurnEnd, tokenizer: Any) -> int:
    """Where a run stops when its last token is the end of the turn, and not the line break after it."""
    place = stop
    while place > first and not tokenizer.decode(ids[place - 1]).strip():
        place -= 1
    if place > first and ids[place - 1] == end.token_id and end.written:
        return place
    place = stop
    while place < len(ids) and ids[place] != end.token_id and not tokenizer.decode(ids[place]).strip():
        place += 1
    return place + 1 if place < len(ids) and ids[place] == end.token_id else stop


def _first_added(text: str, tokenizer: Any) -> int | None:
    """The first token of a text that was added to the vocabulary, as special tokens are."""
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return next((token for token in ids if token in added), None)
