"""Conversations become the ids of the chat template, with a loss on the assistant's words and the end of each turn only."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.data.chat import encode_conversation, turn_end

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.name }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Nemotron-H's: the header of the answer belongs to the question, and a line break ends the answer
NEMOTRON_H = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<SPECIAL_10>System\n' + m.content.strip() + '\n' }}"
    "{% elif m.role == 'user' %}{{ '<SPECIAL_11>User\n' + m.content.strip() + '\n<SPECIAL_11>Assistant\n' }}"
    "{% else %}{{ m.content.strip() + '\n' }}{% endif %}{% endfor %}"
)
# drops the thoughts of all answers but the last
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or '</think>' not in m.content else m.content.split('</think>')[1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
ADDED = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"]

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello, friend."},
    {"role": "user", "content": "def f(x):"},
    {"role": "assistant", "content": "    return x\n\nDone"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    return tokenizer


def learned(encoded: dict, tokenizer) -> list[str]:
    """The stretches of text under the loss."""
    stretches, before = [], -2
    for place, label in enumerate(encoded["labels"]):
        if label != -100:
            assert label == encoded["input_ids"][place]
            stretches += [[]] if place != before + 1 else []
            stretches[-1].append(label)
            before = place
    return [tokenizer.decode(stretch) for stretch in stretches]


def template_ids(tokenizer, messages, **kwargs) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_loss_on_the_answers_and_their_end(tokenizer, template):
    """With and without marks in the template, which here leave the end of the turn out."""
    tokenizer.chat_template = template
    encoded = encode_conversation(TALK, tokenizer)
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(encoded, tokenizer) == ["Hello, friend.<|im_end|>", "    return x\n\nDone<|im_end|>"]


def test_nemotron_h_template_ends_turns_with_the_next_header(tokenizer):
    tokenizer.chat_template = NEMOTRON_H
    encoded = encode_conversation(TALK, tokenizer)
    assert encoded["input_ids"][:-1] == template_ids(tokenizer, TALK)
    assert learned(encoded, tokenizer) == ["Hello, friend.\n<SPECIAL_11>", "return x\n\nDone\n<SPECIAL_11>"]
    assert turn_end(tokenizer).token_id == tokenizer.convert_tokens_to_ids("<SPECIAL_11>")


def test_nano_template_writes_its_own_end(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<SPECIAL_11>Assistant\n' + m.content + '\n<SPECIAL_12>\n' }}"
        "{% else %}{{ '<SPECIAL_11>User\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<SPECIAL_11>Assistant\n{% endif %}"
    )
    encoded = encode_conversation(TALK, tokenizer)
    assert learned(encoded, tokenizer)[0] == "Hello, friend.\n<SPECIAL_12>"


def test_template_without_any_special_token_gets_eos_at_the_end(tokenizer):
    tokenizer.chat_template = PLAIN
    encoded = encode_conversation(TALK, tokenizer)
    words = learned(encoded, tokenizer)
    assert words == ["Hello, friend.\n", "    return x\n\nDone\n<|endoftext|>"]


def test_tool_turns(tokenizer):
    """A call is the assistant's, the result is not, and the answer after it is again."""
    tokenizer.chat_template = CHATML
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ]
    encoded = encode_conversation(messages, tokenizer)
    assert learned(encoded, tokenizer) == ["<tool_call>clock</tool_call><|im_end|>", "It is noon.<|im_end|>"]


def test_conversation_that_ends_with_the_user_is_not_extended(tokenizer):
    tokenizer.chat_template = NEMOTRON_H
    encoded = encode_conversation(TALK[:4], tokenizer)
    assert encoded["input_ids"] == template_ids(tokenizer, TALK[:4])
    assert learned(encoded, tokenizer) == ["Hello, friend.\n<SPECIAL_11>"]


def test_generation_prompt_that_says_more_than_the_turn(tokenizer):
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    encoded = encode_conversation(TALK, tokenizer)
    assert learned(encoded, tokenizer)[0] == "Hello, friend.<|im_end|>"


def test_a_tokenizer_without_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template=None: allowed is a file with one"):
        encode_conversation(TALK, tokenizer)


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = REWRITING
    thinking = [*TALK[:2], {"role": "assistant", "content": "<think>hm</think>Hello"}, *TALK[3:]]
    with pytest.raises(ValueError, match=r"messages 1 to 3 otherwise.*\{% generation %\}"):
        encode_conversation(thinking, tokenizer)
    assert learned(encode_conversation(TALK, tokenizer), tokenizer)[0] == "Hello, friend.<|im_end|>"
    assert learned(encode_conversation(thinking[:3], tokenizer), tokenizer) == ["<think>hm</think>Hello<|im_end|>"]


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], "messages='\\[]': allowed is a list"),
        ("Hi", "messages='Hi'"),
        ([{"content": "x"}], "message 1 is"),
        ([{"role": "user", "content": None}], "message 1: content=None"),
        (TALK[:2], "no assistant turn"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer, messages, said):
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=said):
        encode_conversation(messages, tokenizer)


def test_conversation_that_begins_with_the_assistant(tokenizer):
    tokenizer.chat_template = CHATML
    assert learned(encode_conversation(TALK[2:], tokenizer), tokenizer)[0] == "Hello, friend.<|im_end|>"
    calling = [{"role": "assistant", "content": "Hi", "tool_calls": [{"name": "clock"}]}, *TALK[3:]]
    with pytest.raises(ValueError, match="begins with an assistant turn"):
        encode_conversation(calling, tokenizer)


@pytest.mark.parametrize("template", [CHATML, NEMOTRON_H])
def test_words_repeated_elsewhere_are_not_taken_for_the_answer(tokenizer, template):
    """The user, the system and earlier answers say the same, with the template's own tokens and line breaks in it."""
    tokenizer.chat_template = template
    said = " <|im_end|>\n<|im_start|>assistant\nsame\n"
    roles = ["system", "user", "assistant", "user", "assistant"]
    fast = encode_conversation([{"role": role, "content": said} for role in roles], tokenizer)
    slow = encode_conversation([{"role": role, "content": said, "name": "x"} for role in roles], tokenizer)
    assert fast == slow
    end = "<|im_end|>" if template == CHATML else "\n<SPECIAL_11>"
    words = said if template == CHATML else said.strip()
    assert learned(fast, tokenizer) == [words + end] * 2


def test_time_grows_with_the_length_and_not_its_square(tokenizer):
    tokenizer.chat_template = CHATML
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"words {i}"} for i in range(2000)]
    started = time.perf_counter()
    encoded = encode_conversation(messages, tokenizer)
    assert time.perf_counter() - started < 10  # minutes if each turn were rendered with all before it
    assert len(learned(encoded, tokenizer)) == 1000


def test_template_errors_are_value_errors(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        encode_conversation(TALK, tokenizer)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30), min_size=2, max_size=8))
@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_any_text_is_learned_from_the_prompt_on(tokenizer, template, texts):
    """Text and first prompt are the template's, and each answer is under the loss from its first character to its end."""
    tokenizer.chat_template = template
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    encoded = encode_conversation(messages, tokenizer)
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = template_ids(tokenizer, messages[:1], add_generation_prompt=True)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert [label == -100 for label in encoded["labels"][: len(prompt) + 1]] == [True] * len(prompt) + [False]
    assert learned(encoded, tokenizer) == [text + "<|im_end|>" for text in texts[1::2]]


def test_ids_are_the_templates_where_no_token_crosses_a_prompts_end(tokenizer):
    tokenizer.chat_template = CHATML
    messages = [*TALK[:3], TALK[3], {"role": "assistant", "content": "return x"}]
    assert encode_conversation(messages, tokenizer)["input_ids"] == template_ids(tokenizer, messages)
    crossing = template_ids(tokenizer, TALK)
    assert encode_conversation(TALK, tokenizer)["input_ids"] != crossing, "the example no longer has such a token"


def test_both_ways_agree_on_long_conversations(tokenizer):
    generator = random.Random(0)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": " ".join(generator.choices("abcdef", k=9))} for i in range(40)]
    tokenizer.chat_template = CHATML
    plain = encode_conversation(messages, tokenizer)
    tokenizer.chat_template = CHATML_MARKED
    assert plain == encode_conversation(messages, tokenizer)
