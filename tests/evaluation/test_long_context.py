"""Long-context questions: their lengths, what a reader of the prompt finds, scores, resuming, and answers with a shared cache."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCAB, tiny_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.evaluation import answering, long_context, texts
from nemotron_h_hf.evaluation.long_context import TASKS, LongContextPlan, largest_size, sample, score
from nemotron_h_hf.evaluation.sample_records import Records

TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
DEPTHS = (0.0, 0.5, 1.0)


def encode(prompt: str, answer_start: str) -> list[int]:
    return TOKENIZER(prompt + answer_start, verbose=False)["input_ids"]


def make_prose() -> texts.Prose:
    """Sixty sentences of invented words, and the tests need no file."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioulnrst", k=rng.randrange(4, 9))) for _ in range(300)]
    return texts.prose_of(" ".join(["The", *rng.sample(words, 10)]) + "." for _ in range(60))


PROSE = make_prose()


def make(task: long_context.Task, length: int, index: int = 0, seed: int = 0, depth: float = 0.5):
    return sample(task, length, index, depth if task.by_depth else None, seed, PROSE, encode)


def read_and_answer(text: str) -> str:
    """A reader: finds the answer in the prompt, knowing nothing of how it was made."""
    body, question = text.rsplit("\n\nQuestion: ", 1)
    if found := re.match(r"What (?:is|are all) the secret numbers? of (.+) in the text", question):
        names = re.split(r", | and ", found[1])
        return " ".join(number for name in names for number in re.findall(rf"of {name} is (\d+)\.", body))
    if found := re.match(r"Which variables have the value (\d+)", question):
        values = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", body):
            values[name] = values.get(source, source)
        return " ".join(name for name, value in values.items() if value == found[1])
    if found := re.match(r"Which (\d+) words", question):
        items = re.findall(r"\d+\. (\S+)", body.rsplit("\n\n", 1)[1])
        return " ".join(word for word, _ in Counter(items).most_common(int(found[1])))
    if question.startswith("Which three coded words"):
        counted = Counter(word for word in body.rsplit("\n\n", 1)[1].split() if word != "...")
        return " ".join(word for word, _ in counted.most_common(3))
    found = re.match(r"Where was (the person who taught )?(.+) born\?", question)
    name = found[2]
    if found[1]:
        name = re.search(rf"{name} was born in \w+ and learned the trade from ([\w ]+)\.", body)[1]
    return " ".join(re.findall(rf"{name} was born in (\w+) and", body))


def reader(prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    return [read_and_answer(TOKENIZER.decode(ids)) for ids in prompts]


def guesser(prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Writes numbers and words of the right form that it has not read."""
    rng = random.Random(1)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [f"{rng.randrange(10**6, 10**7)} {''.join(rng.choices(letters, k=6))} in the text" for _ in prompts]


def plan(**changes) -> LongContextPlan:
    names = tuple(task.name for task in TASKS)
    return LongContextPlan(
        **{"tasks": names, "lengths": (1024,), "depths": DEPTHS, "num_samples": 2, "seed": 0, **changes}
    )


# Making questions


@pytest.mark.parametrize("length", (1024, 4000))
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompt_and_answer_fill_the_length(task, length):
    made = make(task, length)
    used = len(made.ids) + made.max_new_tokens
    assert length - 12 <= used <= length
    assert made.max_new_tokens >= 2 * len(encode("", " ".join(made.expected)))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_samples_follow_from_seed_and_index(task):
    assert make(task, 1024) == make(task, 1024)
    others = [make(task, 1024, index=1), make(task, 1024, seed=1)]
    assert all(other.expected != make(task, 1024).expected for other in others)


@pytest.mark.parametrize("task", TASKS[:5], ids=lambda task: task.name)
def test_each_number_stands_in_the_prompt_once(task):
    for index in range(5):
        made = make(task, 1500, index)
        text = TOKENIZER.decode(made.ids)
        assert [text.count(number) for number in made.expected] == [1] * len(made.expected)


@pytest.mark.parametrize("name", ("facts", "facts_two_hops"))
def test_each_town_stands_in_the_prompt_once(name):
    (task,) = [task for task in TASKS if task.name == name]
    made = make(task, 3000)
    assert TOKENIZER.decode(made.ids).count(made.expected[0]) == 1


@pytest.mark.parametrize("depth", (0.0, 0.25, 0.5, 1.0))
def test_needle_lies_at_its_depth(depth):
    made = make(TASKS[0], 4096, depth=depth)
    context = TOKENIZER.decode(made.ids).split("\n\n")[1]
    assert context.index("The secret number") / len(context) == pytest.approx(depth, abs=0.03)


def test_depths_of_one_sample_differ_in_the_place_alone():
    first, last = (make(TASKS[0], 2048, depth=depth) for depth in (0.5, 1.0))
    assert first.expected == last.expected
    assert answering.shared_length([first.ids, last.ids]) > 0.4 * len(first.ids)


def test_too_short_a_length_is_refused_with_the_one_needed():
    with pytest.raises(ValueError, match=r"lengths: 200 is too short for needle, which needs (\d+) tokens") as error:
        make(TASKS[0], 200)
    needed = int(re.search(r"needs (\d+)", str(error.value))[1])
    assert len(make(TASKS[0], needed).ids) + 128 == needed


@given(st.lists(st.integers(0, 9), min_size=40, max_size=200), st.integers(0, 400), st.integers(1, 20))
def test_largest_size_is_that_of_a_search_through_all(steps, budget, smallest):
    totals = list(itertools.accumulate(steps)) + [10**6]
    expected = max((size for size in range(smallest, len(totals)) if totals[size] <= budget), default=None)
    found = largest_size(lambda size: totals[min(size, len(totals) - 1)], budget, smallest)
    assert (found is None) == (expected is None)
    if found is not None:  # equal sizes, or one with as many tokens: a step of 0 may be left out
        assert totals[found] <= budget and totals[found + 1] > budget or totals[found] == budget


def test_prose_leaves_code_and_headings_out():
    lines = ["One two three four five.", "x = f(1)[2:3] != {4: 5}; y.", "A heading", "short."]
    text = "\n\n".join([*lines, *(f"Here are words of {word} in plain prose." for word in PROSE.vocabulary)])
    found = texts.prose_of([text])
    assert ("One", "two", "three", "four", "five.") in found.sentences
    assert len(found.sentences) == 1 + len(PROSE.vocabulary)
    with pytest.raises(ValueError, match="haystack: 1 plain sentences"):
        texts.prose_of(lines)


def test_prose_is_cut_to_the_word_and_goes_round():
    for size in (1, 7, 11, 700, 1000):
        assert sum(len(sentence.split()) for sentence in PROSE.take(50, size)) == size


# Scores


def test_a_reader_scores_all_and_a_guesser_nothing(tmp_path):
    for answer, expected in ((reader, 1.0), (guesser, 0.0)):
        records = Records(tmp_path / f"{expected}.jsonl")
        found = long_context.evaluate(plan(lengths=(1024, 1500)), PROSE, encode, answer, records)
        assert {row["task"]: row["score"] for row in found if row["score"] != expected} == {}
        assert len(found) == 2 * 2 * (len(TASKS) - 1 + len(DEPTHS))


def test_score_is_the_share_found():
    assert score(("12", "34", "56", "78"), "it is 34 and 78") == 0.5
    assert score(("Abc",), "aBC") == 1 and score(("abc",), "") == 0


def test_summary_is_the_mean_by_task_length_and_depth():
    rows = [
        {"task": "needle", "length": 10, "depth": depth, "score": value}
        for depth, value in ((0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (1.0, 1.0))
    ]
    found = {(row["length"], row["depth"]): row for row in long_context.summarise(rows)}
    assert found[10, None]["score"] == 0.75 and found[10, None]["num_samples"] == 4
    assert found[10, 0.0]["score"] == 0.5 and found[10, 1.0]["score"] == 1.0
    assert found[10, None]["stderr"] == pytest.approx(0.25)  # deviation 0.5 over the root of 4


# Resuming


def test_goes_on_after_an_interruption(tmp_path):
    wanted = plan(tasks=("needle", "multikey", "facts"))
    whole = long_context.evaluate(wanted, PROSE, encode, reader, Records(tmp_path / "whole.jsonl"))
    calls = itertools.count()

    def stopped(prompts, max_new_tokens):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return reader(prompts, max_new_tokens)

    path = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        long_context.evaluate(wanted, PROSE, encode, stopped, Records(path))
    done = len(path.read_text().splitlines())
    assert done == 2 * len(DEPTHS) + 1
    with path.open("a") as file:
        file.write('{"key": "facts/1024/0", "sco')  # as a crash leaves it
    asked = []

    def counted(prompts, max_new_tokens):
        asked.extend(prompts)
        return reader(prompts, max_new_tokens)

    assert long_context.evaluate(wanted, PROSE, encode, counted, Records(path)) == whole
    assert len(asked) == len(whole) - done
    assert sorted(path.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())


def test_damaged_records_are_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"key": "a"}) + "\nnonsense\n")
    with pytest.raises(ValueError, match="samples.jsonl line 2 is damaged"):
        Records(path)


# Answers


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def related_prompts() -> list[list[int]]:
    rng = random.Random(3)
    base = [rng.randrange(3, VOCAB) for _ in range(50)]
    turns = [base[:n] + [rng.randrange(3, VOCAB) for _ in range(60 - n)] for n in (10, 30, 30, 50)]
    return [base, *turns, turns[0], base[:20], [5]]


@pytest.mark.parametrize("build", (lambda: tiny_model("dense"), lambda: tiny_model("latent"), tiny_llama))
def test_shared_prompts_are_answered_as_alone(build, monkeypatch):
    """Against `generate()` on each prompt by itself, long pieces cut, prompts that repeat and that contain each other."""
    monkeypatch.setattr(answering, "PIECE", 16)
    model, prompts = build(), related_prompts()
    alone = []
    for ids in prompts:
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        alone.append(model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist())
    assert answering.greedy_answers(model, prompts, 6, ()) == alone
    stop = alone[0][2]
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    assert answering.greedy_answers(model, prompts, 6, {stop}) == cut


def test_shared_tokens_go_through_the_model_once():
    model, seen = tiny_model("dense"), []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    base = list(range(3, 53))
    prompts = [base[:n] + [60 + n // 10] * (60 - n) for n in (10, 30, 50)]
    answering.greedy_answers(model, prompts, 1, ())
    assert sum(seen) == 50 + 50 + 30 + 10  # the trunk, then what is left of each


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompts: one of them has no tokens"):
        answering.greedy_answers(tiny_model("dense"), [[5], []], 1, ())
