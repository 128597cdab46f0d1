"""Rows that join and leave a batch: whatever the others do, a row's logits are those of the row alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SHAPES, VOCAB, tiny_model

from nemotron_h_hf import HybridCache

MODELS = {shape: tiny_model(shape) for shape in SHAPES}


def text(seed, length):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def content(cache):
    """The tensors of a cache, without the memory behind them: its room to grow is not initialised, and may hold NaN."""
    return [
        tensor
        for layer in cache.layers
        for name, tensor in vars(layer).items()
        if isinstance(tensor, torch.Tensor) and not name.endswith("_memory")
    ]


class Running:
    """A batch as a server keeps it: the tokens of each row, and one cache."""

    def __init__(self, model):
        self.model, self.rows, self.cache = model, [], None

    def join(self, tokens):
        alone = HybridCache(self.model.config)
        self.model(tokens[None], cache=alone)
        self.cache = alone if self.cache is None else HybridCache.join([self.cache, alone])
        self.rows.append(tokens)

    def mask(self, new):
        width = max(map(len, self.rows)) + new
        return torch.tensor([[0] * (width - new - len(row)) + [1] * (len(row) + new) for row in self.rows])

    def step(self, seed):
        """Feed each row one token; logits (rows, vocabulary)."""
        fed = text(seed, len(self.rows))
        logits = self.model(fed[:, None], cache=self.cache, attention_mask=self.mask(1)).logits[:, -1]
        self.rows = [torch.cat([row, token[None]]) for row, token in zip(self.rows, fed)]
        return logits

    def leave(self, row):
        stay = [i for i in range(len(self.rows)) if i != row]
        width = max(map(len, self.rows))
        self.rows = [self.rows[i] for i in stay]
        if stay:
            self.cache.keep(stay, drop=width - max(map(len, self.rows)))
        else:
            self.cache = None

    def check(self, logits):
        for row, tokens in enumerate(self.rows):
            alone = self.model(tokens[None]).logits[0, -1]
            torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-5)


ACTIONS = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 23)), st.tuples(st.just("leave"), st.integers(0, 9)), st.just(("step", 0))
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(shape=st.sampled_from(sorted(SHAPES)), schedule=st.lists(ACTIONS, min_size=4, max_size=14))
def test_a_row_is_what_it_is_alone(shape, schedule):
    with torch.no_grad():
        batch = Running(MODELS[shape])
        for number, (what, value) in enumerate([*schedule, ("step", 0)]):
            if what == "join" and len(batch.rows) < 5:
                batch.join(text(number, value))
            elif what == "leave" and batch.rows:
                batch.leave(value % len(batch.rows))
            elif what == "step" and batch.rows:
                batch.check(batch.step(100 + number))


@pytest.mark.parametrize("shape", ["dense", "attention_free", "moe"])
def test_a_taken_row_goes_on_alone_and_the_batch_without_notice(shape):
    batch = Running(MODELS[shape])
    for seed, length in enumerate([9, 3, 17]):
        batch.join(text(seed, length))
    batch.step(50)
    taken = batch.cache.take(1, padding=14)
    assert int(taken.get_seq_length()) == 4
    held = [tensor.clone() for tensor in content(batch.cache)]
    logits = batch.model(torch.tensor([[5]]), cache=taken).logits[0, -1]
    alone = batch.model(torch.cat([batch.rows[1], torch.tensor([5])])[None]).logits[0, -1]
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    assert all(map(torch.equal, held, content(batch.cache)))
    batch.check(batch.step(51))


def test_joining_leaves_the_parts_as_they_are():
    model, parts = MODELS["dense"], [HybridCache(MODELS["dense"].config) for _ in range(2)]
    for seed, cache in enumerate(parts):
        model(text(seed, 5 + seed)[None], cache=cache)
    joined = HybridCache.join(parts)
    model(torch.tensor([[3], [4]]), cache=joined, attention_mask=torch.tensor([[0] + [1] * 6, [1] * 7]))
    for seed, cache in enumerate(parts):
        logits = model(torch.tensor([[3]]), cache=cache).logits[0, -1]
        alone = model(torch.cat([text(seed, 5 + seed), torch.tensor([3])])[None]).logits[0, -1]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


def test_what_cannot_be_moved_is_refused():
    model = MODELS["dense"]
    empty, static, recording = (HybridCache(model.config, *room) for room in ((), (32,), ()))
    model(text(0, 5)[None], cache=static)
    recording.activate_past_recording()
    model(text(0, 5)[None], cache=recording)
    for cache, words in ((empty, "empty"), (static, "static"), (recording, "records")):
        with pytest.raises(ValueError, match=words):
            HybridCache.join([cache])
    recording.crop(0)
    with pytest.raises(ValueError, match=r"rows=\[1\]: allowed are some of 0 to 0"):
        recording.keep([1])
    with pytest.raises(ValueError, match="drop=5: allowed is 0 to 4"):
        recording.take(0, padding=5)
    with pytest.raises(ValueError, match="one cache or more"):
        HybridCache.join([])
