"""Answers of conversations, read as they come: reasoning, content and tool calls, however the text is cut."""

import json

import pytest

pytest.importorskip("fastapi")
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: E402

from nemotron_h_hf.serving.chat import CAN_PARSE, Conversation, Reader, joined  # noqa: E402
from nemotron_h_hf.serving.protocol import Message  # noqa: E402
from nemotron_h_hf.tokenizer_files import RESPONSE_TEMPLATES, portable_config, response_template_for  # noqa: E402

pytestmark = pytest.mark.skipif(not CAN_PARSE, reason="this transformers has no parser")
V3, V2 = RESPONSE_TEMPLATES.values()
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {
    "a": {"type": "integer"}, "note": {"type": "string"}}}}}]  # fmt: skip
ANSWERS = {
    "v3": (V3, "<|im_start|>assistant\n<think>\n", "Add <them>.\n</think>\n\nI will.\n<tool_call>\n<function=add>\n<parameter=a>\n41\n"
           "</parameter>\n<parameter=note>\nx < 3\n</parameter>\n</function>\n</tool_call><|im_end|>"),
    "v2": (V2, "<SPECIAL_11>Assistant\n<think>\n", "Add <them>.\n</think>\n\nI will.\n"
           '<TOOLCALL>[{"name": "add", "arguments": {"a": 41, "note": "x < 3"}}]</TOOLCALL><SPECIAL_12>'),
}  # fmt: skip


def reader(template, prefix):
    parser = PreTrainedTokenizerBase.get_response_parser(PreTrainedTokenizerFast, template, prefix=prefix, tools=TOOLS)
    return Reader(parser)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("name", ANSWERS)
def test_reasoning_content_and_calls(name, size):
    template, prefix, text = ANSWERS[name]
    found = reader(template, prefix)
    deltas = [delta for at in range(0, len(text), size) for delta in found.feed(text[at : at + size])] + found.finish()
    message = joined(deltas)
    assert message["reasoning_content"].strip() == "Add <them>." and message["content"].strip() == "I will."
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"]) == {"a": 41, "note": "x < 3"}
    assert found.num_calls == 1 and "index" not in call


@pytest.mark.parametrize("knows, role", [("system", "system"), ("developer", "developer")])
def test_a_developer_is_the_system_where_the_template_knows_no_other(knows, role):
    """A template that names the roles it shows passes over all others."""
    shown = "{% if m.role in ('NAME', 'user') %}[{{ m.role }}]{{ m.content }}{% endif %}"
    template = "{% for m in messages %}" + shown.replace("NAME", knows) + "{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), chat_template=template)
    messages = [Message(role="developer", content="Be brief."), Message(role="user", content="Hi.")]
    assert Conversation(tokenizer, messages).text == f"[{role}]Be brief.[user]Hi."


def test_two_calls_have_two_indices():
    template, prefix, _ = ANSWERS["v3"]
    found = reader(template, prefix.replace("<think>\n", ""))
    call = "<tool_call><function=add><parameter=a>1</parameter></function></tool_call>"
    deltas = found.feed(call + call) + found.finish()
    assert [one["index"] for delta in deltas for one in delta["tool_calls"]] == [0, 1]


def test_a_call_that_is_none_is_shown():
    template, prefix, _ = ANSWERS["v2"]
    found = reader(template, prefix.replace("<think>\n", ""))
    deltas = found.feed("Well <TOOLCALL>[{oh}]</TOOLCALL>") + found.feed(" then") + found.finish()
    message = joined(deltas)
    assert "tool_calls" not in message and "[{oh}]" in message["content"] and message["content"].endswith(" then")


@pytest.mark.parametrize("name", ANSWERS)
def test_a_call_that_does_not_end_is_shown(name):
    """Every beginning of an answer, ended there: a call is there as a whole or as the text that it is."""
    template, prefix, text = ANSWERS[name]
    for end in range(text.index("I will.") + len("I will."), len(text)):
        found = reader(template, prefix)
        message = joined(found.feed(text[:end]) + found.finish())
        called = "</tool_call>" in text[:end] or "</TOOLCALL>" in text[:end]
        assert ("tool_calls" in message) == called, text[:end]
        said = message["content"] or ""
        after = text[:end].partition("</tool_call>" if name == "v3" else "</TOOLCALL>")[2]
        assert said == ("I will.\n" + after if called else text[text.index("I will.") : end]), text[:end]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_the_end_token_is_no_content(end):
    template, prefix, text = ANSWERS["v3"]
    for answer in ("fine", "fine <thi", text.removesuffix("<|im_end|>")):
        found = reader(template, prefix.replace("<think>\n", ""))
        message = joined(found.feed(answer) + found.finish(end))
        assert end not in str(message) and "\0" not in str(message)
        assert message["content"] == answer or "tool_calls" in message


def test_a_template_without_an_end_of_calls_ends_them_with_the_answer():
    form = {"start_anchor": "<a>", "fields": {"tool_calls": {"open": "[CALLS]", "content": "json", "transform_each": True,
                                      "transform": V2["fields"]["tool_calls"]["transform"]}, "content": {}}}  # fmt: skip
    for end, called in (("</s>", True), ("", False)):
        parser = PreTrainedTokenizerBase.get_response_parser(PreTrainedTokenizerFast, form, prefix="<a>", tools=TOOLS)
        found = Reader(parser, calls_end=False)
        message = joined(found.feed('[CALLS][{"name": "add", "arguments": {}}]') + found.finish(end))
        assert ("tool_calls" in message) == called, message


@pytest.mark.parametrize("marker, form", RESPONSE_TEMPLATES.items())
@pytest.mark.parametrize("own_file", [False, True])
def test_a_known_chat_format_is_written_with_its_response_template(marker, form, own_file, tmp_path):
    template = "{{ messages }}" + marker + "\n"
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({} if own_file else {"chat_template": template})
    if own_file:
        (tmp_path / "chat_template.jinja").write_text(template)
    written = json.loads(portable_config(json.dumps(config), tmp_path))
    assert written["response_template"] == form
    own = json.dumps(config | {"response_template": {"fields": {}}})
    assert json.loads(portable_config(own, tmp_path))["response_template"] == {"fields": {}}, "the folder's own stays"
    assert response_template_for("{{ messages }}") is None
