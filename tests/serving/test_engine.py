"""The engine: rows of many budgets in running batches write what `generate` writes for each of them alone."""

import os
import queue
import random
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHElasticForCausalLM
from nemotron_h_hf.serving import heap
from nemotron_h_hf.serving.engine import Engine
from nemotron_h_hf.serving.requests import Busy, Request, TooLarge
from nemotron_h_hf.serving.text import token_bytes, token_text

BUDGETS = {
    "large": {},
    "small": {"hidden_size": 32, "mamba_num_heads": 4, "num_attention_heads": 2, "intermediate_size": 40},
    "short": {"layers": [0, 1, 3, 4, 5], "mamba_num_heads": 6},
}
SOME = [None, *BUDGETS]


@pytest.fixture(scope="module")
def parent():
    ordinary = tiny_model("dense", elastic={"version": 1, "budgets": BUDGETS})
    ordinary.generation_config.eos_token_id = 96
    return NemotronHElasticForCausalLM.from_model(ordinary)


@pytest.fixture(scope="module")
def words():
    """Token i is the letter chr(i + 32), but for the two of thinking."""
    letters = {chr(i + 32): i for i in range(97)}
    vocabulary = {**letters, "<think>": 97, "</think>": 98}
    del vocabulary["!"], vocabulary['"']
    vocabulary |= {"<think>": 1, "</think>": 2}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=" "))
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ids(seed, length):
    return torch.randint(3, 95, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def greedy(parent, tokens, count, budget):
    written = parent.generate(
        torch.tensor([tokens]), max_new_tokens=count, do_sample=False, pad_token_id=0, budget=budget
    )
    return written[0, len(tokens) :].tolist()


def test_many_at_once_write_what_each_writes_alone(parent):
    engine = Engine(parent, piece=8, max_batch=6)
    requests = [
        Request(tokens=ids(i, 1 + 5 * i % 37), budget=SOME[i % 4], max_tokens=3 + i % 9, temperature=0)
        for i in range(10)
    ]
    for request, (answer,) in zip(requests, engine.generate(requests)):
        assert answer.tokens == greedy(parent, list(request.tokens), request.max_tokens, request.budget)
        assert answer.finish_reason == ("stop" if answer.tokens[-1] == 96 else "length")
    assert not engine.running and not engine.room.reserved() and not engine.turn()


KINDS = {
    "dense": {"shape": "dense", "budgets": BUDGETS},
    "experts and windows by layer": {
        "shape": "moe", "hybrid_override_pattern": "MEM*EM*", "moe_intermediate_size": [24, 16], "num_experts_per_tok": [3, 1],
        "sliding_window": [5, None], "budgets": {"few": {"n_routed_experts": [8, 4], "moe_intermediate_size": [8, 16],
                                                         "num_attention_heads": 2}}},
    "multi-token prediction": {"shape": "latent", "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E",
                               "budgets": {"small": {"hidden_size": 32, "mamba_num_heads": 4}}},
}  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_and_leave_do_not_change_the_others(kind, seed):
    """Requests come, share beginnings, have copies, and go, by a random schedule: each row writes what it writes alone."""
    settings = dict(KINDS[kind])
    budgets = settings.pop("budgets")
    ordinary = tiny_model(settings.pop("shape"), elastic={"version": 1, "budgets": budgets}, **settings)
    parent = NemotronHElasticForCausalLM.from_model(ordinary)
    engine, choose = Engine(parent, piece=5, max_batch=6, memory=2**18), random.Random(seed)
    written, jobs, gone = {}, [], set()
    for i in range(9):
        shared = ids(seed, choose.choice((0, 7, 11)))
        tokens = [*shared, *ids(i, choose.randrange(1, 25))]
        request = Request(tokens=tokens, budget=choose.choice([None, *budgets]), max_tokens=choose.randrange(1, 9),
                          n=choose.choice((1, 1, 2)), temperature=0, ignore_eos=True, marks=(len(shared),))  # fmt: skip
        take = lambda piece, i=i: written.setdefault((i, piece.index), []).extend(piece.tokens)  # noqa: E731
        jobs.append(engine.submit(request, take))
        if choose.random() < 0.3:
            gone.add(choose.randrange(len(jobs)))
            jobs[max(gone)].cancel()
        for _ in range(choose.randrange(5)):
            engine.turn()
            assert engine.room.reserved() + engine.prefixes.num_bytes <= engine.room.limit
    while engine.turn():
        pass
    assert not engine.running and not engine.room.reserved() and not engine.batches
    for i, job in enumerate(jobs):
        alone = greedy_past_eos(parent, job.request)
        for index in range(job.request.n):
            got = written.get((i, index), [])
            assert got == alone[: len(got)] and (job.cancelled or len(got) == len(alone)), (i, index)


@torch.no_grad()
def greedy_past_eos(parent, request):
    tokens = list(request.tokens)
    model = parent if request.budget is None else parent.submodel(request.budget)
    for _ in range(request.max_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(request.tokens) :]


def test_copies_read_the_prompt_once_and_are_drawn_apart(parent):
    engine, read = Engine(parent), []
    plain = engine._read_piece
    engine._read_piece = lambda reading: read.append(1) or plain(reading)
    settings = {"tokens": ids(0, 20), "budget": "small", "max_tokens": 6, "ignore_eos": True}
    ((one, two, three),) = engine.generate([Request(**settings, n=3, seed=5)])
    assert len(read) == 2 and one.tokens != two.tokens != three.tokens
    alone = engine.generate([Request(**settings, seed=5), Request(**settings, seed=7)])
    assert [alone[0][0].tokens, alone[1][0].tokens] == [one.tokens, three.tokens]


def test_kept_prompts_give_the_same_answers(parent):
    engine, fresh = Engine(parent, piece=8), Engine(parent, piece=8)
    first = Request(tokens=ids(1, 40), budget="small", max_tokens=8, temperature=0, marks=(11,), ignore_eos=True)
    ((answer,),) = engine.generate([first])
    turns = [
        first,
        Request(tokens=[*first.tokens, *answer.tokens, *ids(2, 9)], budget="small", temperature=0),
        Request(tokens=[*first.tokens[:11], *ids(3, 9)], budget="small", temperature=0),
        Request(tokens=first.tokens, budget="large", temperature=0),
    ]
    cached = []
    for request in turns:
        job = engine.submit(request, lambda piece: None)
        engine.turn()
        cached.append(job.num_cached)
        job.cancel()
    assert cached == [39, 47, 11, 0]
    again, new = (it.generate(turns) for it in (engine, fresh))
    assert [a.tokens for (a,) in again] == [a.tokens for (a,) in new]


def test_memory_bounds_what_is_kept_and_what_runs(parent):
    one = Request(tokens=ids(0, 30), max_tokens=10, temperature=0, ignore_eos=True)
    room = Engine(parent).room
    job = Engine(parent).submit(one, print)
    engine = Engine(parent, memory=2 * room.alone(job))
    requests = [Request(tokens=ids(i, 30), max_tokens=10, temperature=0, ignore_eos=True) for i in range(5)]
    rows = []
    for request in requests:
        engine.submit(request, lambda piece: rows.append(len(engine.running)))
    while engine.turn():
        assert engine.room.reserved() + engine.prefixes.num_bytes <= engine.room.limit
    assert len(rows) == 50 and max(rows) == 2 and len(engine.prefixes)
    with pytest.raises(TooLarge, match="n=3: this takes .* allowed are"):
        engine.submit(Request(tokens=ids(0, 30), max_tokens=10, n=3), print)
    with pytest.raises(TooLarge, match="allowed are 50 tokens together"):
        Engine(parent, max_context=50).submit(Request(tokens=ids(0, 30), max_tokens=21), print)


def test_a_full_queue_says_when_to_come_again(parent):
    engine = Engine(parent, queue=2, max_batch=1)
    for _ in range(2):
        engine.submit(Request(tokens=[5]), print)
    with pytest.raises(Busy) as busy:
        engine.submit(Request(tokens=[5]), print)
    assert busy.value.seconds >= 1


def test_without_a_queue_a_request_runs_or_is_refused(parent):
    engine = Engine(parent, queue=0, max_batch=2)
    got = []
    engine.submit(Request(tokens=[5], n=2, max_tokens=2, ignore_eos=True), got.append)
    engine.turn()
    with pytest.raises(Busy):
        engine.submit(Request(tokens=[5]), print)
    while engine.turn():
        pass
    engine.submit(Request(tokens=[5]), print)
    assert len(got) == 4


def test_a_fault_of_the_engine_fails_what_waits_too(parent, monkeypatch):
    """Else it would be met again at every turn, for ever."""
    engine, got, plain = Engine(parent), queue.Queue(), Engine._admit
    monkeypatch.setattr(Engine, "_admit", lambda self: 1 / 0)
    engine.start()
    engine.submit(Request(tokens=[5]), got.put)
    assert isinstance(got.get(timeout=20), ZeroDivisionError)
    monkeypatch.setattr(Engine, "_admit", plain)
    engine.submit(Request(tokens=[5], max_tokens=1), got.put)
    assert got.get(timeout=20).finish_reason == "length"
    engine.stop()


def test_a_failing_row_fails_alone(parent, monkeypatch):
    """A batch that cannot be computed with one of its rows: that row's request fails, the others write what they would."""
    small = parent.submodel("small")
    plain = type(small).forward

    def forward(self, input_ids, *args, **kwargs):
        if self is small and input_ids.shape[1] == 1 and bool((input_ids == 3).any()):
            raise RuntimeError("token 3")
        return plain(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(small), "forward", forward)
    engine, got = Engine(parent), {}
    always = {"logit_bias": {3: 100}, "max_tokens": 4}
    for i in range(4):
        request = Request(tokens=ids(i, 6), budget="small", **(always if i == 2 else {"max_tokens": 8, "temperature": 0,
                          "logit_bias": {3: -100}, "ignore_eos": True}))  # fmt: skip
        engine.submit(request, lambda piece, i=i: got.setdefault(i, []).append(piece))
    while engine.turn():
        pass
    monkeypatch.undo()
    assert isinstance(got[2][-1], RuntimeError)
    alone = Engine(parent)
    for i in (0, 1, 3):
        ((answer,),) = alone.generate([Request(tokens=ids(i, 6), budget="small", max_tokens=8, temperature=0,
                                               logit_bias={3: -100}, ignore_eos=True)])  # fmt: skip
        assert [token for piece in got[i] for token in piece.tokens] == answer.tokens


def test_nan_fails_one_request(parent, monkeypatch):
    engine, got = Engine(parent), {}
    plain = Engine._read_piece
    monkeypatch.setattr(
        Engine, "_read_piece", lambda self, it: plain(self, it) * (float("nan") if it.tokens[0] == 7 else 1)
    )
    for first in (7, 8):
        engine.submit(Request(tokens=[first, 9]), lambda piece, first=first: got.setdefault(first, []).append(piece))
    while engine.turn():
        pass
    assert isinstance(got[7][0], ArithmeticError) and got[8][-1].finish_reason


def test_stops_and_thinking_in_the_text(parent, words):
    engine, plain = Engine(parent, words), Engine(parent, words)
    settings = {
        "tokens": ids(3, 9),
        "max_tokens": 20,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {1: -100, 2: -100},
    }
    ((whole,),) = plain.generate([Request(**settings)])
    assert whole.text == "".join(words.convert_ids_to_tokens(whole.tokens))
    stop = whole.text[7:10]
    ((short,),) = engine.generate([Request(**settings, stop=(stop, "never"))])
    assert short.text == whole.text[: whole.text.find(stop)] and short.finish_reason == "stop"
    thinking = {**settings, "tokens": [*ids(3, 9), 1]}
    ((thought,),) = engine.generate([Request(**thinking, thinking_budget=5)])
    assert 2 in thought.tokens and thought.tokens.index(2) in (5, 6) and thought.num_thinking_tokens in (6, 7)
    ((free,),) = engine.generate([Request(**settings, thinking_budget=5)])
    assert 2 not in free.tokens


def test_an_end_token_is_said_apart_from_the_text(parent, words):
    bias = {"max_tokens": 4, "keep_special": True, "logit_bias": {2: 100}, "temperature": 0}
    engine, pieces = Engine(parent, words), []
    engine.ends = {2}
    engine.submit(Request(tokens=ids(3, 9), **bias), pieces.append)
    while engine.turn():
        pass
    assert [(it.text, it.end, it.finish_reason) for it in pieces] == [("", "</think>", "stop")]


def test_tokens_that_are_parts_of_letters():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    text = "h\u00e9 \U0001f389 \u4f60\u597d <|endoftext|>"
    parts = [token_bytes(tokenizer, token) for token in tokenizer(text)["input_ids"]]
    assert b"".join(parts) == text.encode() and token_text(parts[1]) == "bytes:\\xc3" and token_text(parts[0]) == "h"


def test_the_small_one_thinks_and_the_large_one_answers(parent, words):
    tokens = [*ids(4, 9), 1]
    ((answer,),) = Engine(parent, words).generate([
        Request(tokens=tokens, budget="small", answer_budget="large", max_tokens=14, temperature=0, ignore_eos=True,
                thinking_budget=4)
    ])  # fmt: skip
    end = answer.tokens.index(2) + 1
    thought = greedy_past_eos(parent, Request(tokens=tokens, budget="small", max_tokens=4))
    said = greedy_past_eos(parent, Request(tokens=[*tokens, *answer.tokens[:end]], max_tokens=14 - end))
    assert answer.tokens == [*thought, 0, 2, *said] and end == 6


def test_scores_are_the_models_own(parent):
    tokens = ids(5, 12)
    ((answer,),) = Engine(parent).generate([
        Request(tokens=tokens, max_tokens=5, seed=1, temperature=1.7, logprobs=3, logit_bias={4: 6}, ignore_eos=True)
    ])  # fmt: skip
    with torch.no_grad():
        logits = parent(torch.tensor([[*tokens, *answer.tokens]])).logits[0, len(tokens) - 1 : -1].log_softmax(-1)
    for place, score in enumerate(answer.scores):
        assert score.token == answer.tokens[place]
        assert score.logprob == pytest.approx(float(logits[place, score.token]), abs=1e-4)
        assert [token for token, _ in score.top] == logits[place].topk(3).indices.tolist()


def test_the_running_thread_ends_in_order(parent):
    engine = Engine(parent)
    engine.start()
    answers = engine.generate([Request(tokens=[5, 6], max_tokens=3, temperature=0)])
    assert answers[0][0].tokens == greedy(parent, [5, 6], 3, None) and engine.is_alive()
    got = []
    engine.submit(Request(tokens=[5], max_tokens=4000, ignore_eos=True), got.append)
    engine.stop(0.2)
    assert type(got[-1]).__name__ == "Stopped" and not engine.is_alive()


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", 2.1), ("temperature", float("nan")), ("top_p", 0), ("min_p", 1.1), ("n", 0), ("seed", 2**64), ("stop", ("",)),
    ("max_tokens", 0), ("logprobs", 21), ("presence_penalty", 3), ("repetition_penalty", 0), ("logit_bias", {1: 101}),
])  # fmt: skip
def test_what_is_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*allowed is"):
        Request(tokens=[1], **{field: value})


def test_tokens_and_budgets_that_are_not_there(parent):
    engine = Engine(parent)
    with pytest.raises(ValueError, match=r"ids from 0 to 96"):
        engine.submit(Request(tokens=[97]), print)
    with pytest.raises(ValueError, match="budget='7b'"):
        engine.submit(Request(tokens=[5], budget="7b"), print)


@pytest.mark.skipif(heap.LIBC is None, reason="not glibc")
def test_freed_memory_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pieces = [torch.ones(2**14) for _ in range(2000)]  # 64 KiB each, in the heap
    last = torch.ones(2**10)  # above them: what lies below stays glibc's
    full = resident()
    del pieces
    heap.give_back()
    assert full - resident() > 100 * 2**20
    assert last.sum() == 2**10
