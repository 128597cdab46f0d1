"""Long conversations keep all short ones, stay within the target, and ask only what earlier turns answer."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.data.chat import encode_conversation
from nemotron_h_hf.data.long_conversations import LongConversations, add_references, join_conversations
from nemotron_h_hf.data.packing import WholeRows


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def talk(number: int, turns: int = 2) -> list[dict]:
    messages = []
    for turn in range(turns):
        messages += [user(f"Question {turn} of talk {number} ?"), says(f"It is {number * 10 + turn} .")]
    return messages


def encode(messages: list[dict], tools: list | None = None) -> dict:
    """A template for tests: one token per word and message, and the messages themselves to look at."""
    ids = [len(word) for message in messages for word in [message["role"], *message["content"].split()]]
    return {"input_ids": ids, "labels": ids, "messages": messages}


TALKS = [talk(n, 1 + n % 4) for n in range(40)]
SYNTHETIC = re.compile(r"Earlier I said|message number|Which message of mine")


def originals(messages: list[dict]) -> list[dict]:
    """The messages without the synthetic turns."""
    kept, skip = [], False
    for message in messages:
        skip = bool(SYNTHETIC.search(message["content"])) if message["role"] == "user" else skip
        kept += [] if skip else [message]
    return kept


@pytest.mark.parametrize("references", [0, 1, 6])
def test_all_conversations_are_there_within_the_target(references):
    made = [e["messages"] for e in LongConversations(TALKS, encode, 300, references, seed=1)]
    assert [m for messages in made for m in originals(messages)] == [m for t in TALKS for m in t]
    lengths = [len(encode(messages)["input_ids"]) for messages in made]
    assert max(lengths) <= 300 and min(lengths[:-1]) > 200
    added = [(len(messages) - len(originals(messages))) // 2 for messages in made]
    assert max(added) <= references and min(added[:-1]) >= min(references, 1)
    roles = [[m["role"] for m in messages] for messages in made]
    assert all(r == ["user", "assistant"] * (len(r) // 2) for r in roles)


def test_every_reference_has_one_answer_and_it_is_the_right_one():
    """Each kind of question is answered again here from the turns before it."""
    kinds = set()
    for seed in range(5):
        for encoded in LongConversations(TALKS, encode, 400, 8, seed=seed):
            messages = encoded["messages"]
            for place, message in enumerate(messages):
                if message["role"] != "user" or not SYNTHETIC.search(message["content"]):
                    continue
                before, answer = messages[:place], messages[place + 1]["content"]
                pairs = list(zip(originals(before)[::2], originals(before)[1::2]))
                if match := re.search(r"message number (\d+)", message["content"]):
                    expected = [[m["content"] for m in before if m["role"] == "user"][int(match[1]) - 1]]
                elif match := re.search(r'Earlier I said: "(.*)" Repeat', message["content"]):
                    expected = [a["content"] for q, a in pairs if q["content"] == match[1]]
                else:
                    quote = re.search(r'answer with: "(.*)" Repeat', message["content"])[1]
                    expected = [q["content"] for q, a in pairs if a["content"] == quote]
                assert expected == [answer]
                kinds.add(message["content"].split()[0])
    assert kinds == {"What", "Earlier", "Which"}


def test_nothing_ambiguous_is_asked():
    """With the same question answered in two ways, and one answer to all, only the number of a message tells."""
    messages = [user("Same"), says("A"), user("Same"), says("B"), user("Other"), says("A")]
    import random

    for seed in range(60):
        extended = add_references(messages, 3, random.Random(seed), 10**6, lambda turns: 1)
        for place, message in enumerate(extended):
            asked = message["content"]
            if "Earlier I said" in asked and '"Same"' in asked:
                answers = {extended[n + 1]["content"] for n in range(place) if extended[n]["content"] == "Same"}
                assert answers == {extended[place + 1]["content"]}
            if "Which message" in asked and '"A"' in asked:
                questions = {extended[n - 1]["content"] for n in range(1, place) if extended[n]["content"] == "A"}
                assert questions - {m["content"] for m in extended if SYNTHETIC.search(m["content"])} == {"Same"}


def test_places_are_spread_and_seeded():
    places = set()
    for seed in range(30):
        (encoded, *_) = LongConversations(TALKS, encode, 400, 1, seed=seed)
        places |= {n for n, m in enumerate(encoded["messages"]) if SYNTHETIC.search(m["content"])}
    assert len(places) > 12 and min(places) < 10 and max(places) > 35
    assert list(LongConversations(TALKS, encode, 400, seed=2)) == list(LongConversations(TALKS, encode, 400, seed=2))


def test_tools_and_systems():
    """A call and its result stay together, and no turn of them is asked about; later systems go into the question."""
    calling = [
        user("Time?"),
        {"role": "assistant", "content": "", "tool_calls": [1]},
        {"role": "tool", "content": "x"},
        says("Noon"),
    ]
    first = [{"role": "system", "content": "Brief."}, *talk(1, 1)]
    other = [{"role": "system", "content": "Loud."}, *talk(2, 1)]
    joined = join_conversations([first, calling, first, other])
    assert [m["role"] for m in joined].count("system") == 1
    assert joined[-2]["content"] == "Loud.\n\nQuestion 0 of talk 2 ?"
    assert joined[7]["content"] == "Question 0 of talk 1 ?"
    import random

    for seed in range(40):
        extended = add_references(joined, 5, random.Random(seed), 10**6, lambda turns: 1)
        place = extended.index(calling[0])
        assert extended[place : place + 4] == calling
        assert all("Time?" not in m["content"] and "Noon" not in m["content"] for m in extended if m not in calling)


@settings(max_examples=40, deadline=None)
@given(done=st.integers(0, 12), target=st.integers(60, 400))
def test_resume_goes_on_exactly(done, target):
    whole = list(LongConversations(TALKS, encode, target, seed=3))
    before = LongConversations(TALKS, encode, target, seed=3)
    iterator = iter(before)
    for _ in range(min(done, len(whole))):
        next(iterator)
    after = LongConversations(TALKS, encode, target, seed=3)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert list(after) == whole[done:] or done >= len(whole)


def test_through_a_tokenizer_into_rows():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    long = LongConversations(TALKS, lambda m, tools: encode_conversation(m, tokenizer, tools), 700, 4, seed=1)
    rows = list(WholeRows(long, 700))
    assert len(rows) > 3
    learned = tokenizer.decode(rows[0]["labels"][rows[0]["labels"] != -100])
    assert "It is 0 .<|im_end|>" in learned and "user" not in learned
    assert SYNTHETIC.search(tokenizer.decode(rows[0]["input_ids"]))


def with_tools(messages: list[dict], tools: list | None = None) -> dict:
    """As `encode`, with the tools before everything, and both to look at."""
    encoded = encode([{"role": "tools", "content": " ".join(tools or [])}, *messages])
    return {**encoded, "messages": messages, "tools": tools}


def test_tools_are_kept_and_not_mixed():
    sets = [None, ["clock"], ["clock", "map"], []]
    chats = [{"messages": talk(n), "tools": sets[n // 5 % 4]} for n in range(40)]
    made = list(LongConversations(chats, with_tools, 200, 2, seed=1))
    expected = [(m["content"], chat["tools"] or None) for chat in chats for m in chat["messages"]]
    assert [(m["content"], e["tools"]) for e in made for m in originals(e["messages"])] == expected
    assert any(len(originals(e["messages"])) > 4 for e in made if e["tools"]) and len(made) < len(chats) / 2


def alternating(messages: list[dict], tools: list | None = None) -> dict:
    """As `encode`, refusing two turns of one side in a row, as many chat templates do."""
    roles = [message["role"] for message in messages]
    if any(a == b for a, b in zip(roles, roles[1:])):
        raise ValueError("roles must alternate")
    return encode(messages)


def test_only_whole_exchanges_are_joined():
    open_end, answer_first = [*talk(1), user("And then?")], [says("Welcome ."), *talk(2)]
    talks = [talk(0), open_end, talk(3), answer_first, talk(4), talk(5)]
    made = [e["messages"] for e in LongConversations(talks, alternating, 300, 0)]
    assert made == [talk(0) + open_end, talk(3), answer_first + talk(4) + talk(5)]


def test_what_the_template_will_not_have_joined_is_reported(caplog):
    def refuse(messages, tools=None):
        if sum("of talk 3 " in m["content"] or "of talk 4 " in m["content"] for m in messages) > 2:
            raise ValueError("not these together")
        return encode(messages)

    chats = [{"messages": talk(n), "origin": f"a.jsonl:{n + 1}"} for n in range(8)]
    whole = LongConversations(chats, refuse, 100)
    made = list(whole)
    kept = {m["content"].split()[-2] for e in made for m in originals(e["messages"]) if m["role"] == "user"}
    lost = [n for n in range(8) if str(n) not in kept]
    assert {3, 4} <= set(lost) and len(lost) < 5
    assert dict(whole.bad.counts) == {"cannot be joined": len(lost)}
    assert "a.jsonl:4: cannot be joined (not these together)" in caplog.text
    for done in range(len(made)):
        before, after = LongConversations(chats, refuse, 100), LongConversations(chats, refuse, 100)
        iterator = iter(before)
        for _ in range(done):
            next(iterator)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert list(after) == made[done:] and after.bad.counts == whole.bad.counts
    with pytest.raises(ValueError, match="a.jsonl:4: cannot be joined"):
        list(LongConversations(chats, refuse, 100, on_bad_data="error"))


def test_conversations_that_cannot_be_used(caplog):
    def refuse(messages, tools):
        if messages[0]["content"] == "no":
            raise ValueError("not this one")
        return encode(messages)

    long = LongConversations([talk(1), [user("no"), says("x")], talk(2, 60)], refuse, 100)
    assert [originals(e["messages"]) for e in long] == [talk(1)]
    assert dict(long.bad.counts) == {"cannot be encoded": 1, "longer than target_tokens": 1}
    assert "not this one" in caplog.text
    for name, value in (("target_tokens", 0), ("num_references", -1), ("reference_share", 1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            LongConversations(TALKS, encode, **{"target_tokens": 10, name: value})
