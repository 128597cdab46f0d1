"""The choice of tokens against transformers' own processors, and the draw against its probabilities."""

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from nemotron_h_hf.serving.requests import Request
from nemotron_h_hf.serving.sampling import draw, narrowed, penalise


def random_logits(size=300):
    return torch.randn(size, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(("settings", "processor"), [
    ({"top_k": 7}, TopKLogitsWarper(7)), ({"top_p": 0.8}, TopPLogitsWarper(0.8)), ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
    ({"min_p": 0.1}, MinPLogitsWarper(0.1)), ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
])  # fmt: skip
def test_what_is_left_is_what_transformers_leaves(settings, processor):
    theirs = processor(None, random_logits()[None])[0]
    assert torch.equal(narrowed(random_logits(), Request(tokens=[1], **settings)), theirs)


def test_repetition_is_penalised_as_in_transformers():
    ours, ids = random_logits(), [3, 8, 9]
    penalise(ours, Request(tokens=ids[:2], repetition_penalty=1.3), {9: 2})
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), random_logits()[None])[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("more", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}, {"repetition_penalty": 1e-45}])
def test_the_smallest_temperatures_take_the_likeliest(temperature, more):
    greedy, small = (Request(tokens=[3, 8], temperature=it, **more) for it in (0, temperature))
    drawn = {draw(random_logits(), small, {}, torch.Generator().manual_seed(seed)) for seed in range(5)}
    assert drawn == {draw(random_logits(), greedy, {}, torch.Generator())}


def test_draws_have_their_probabilities():
    logits, generator = torch.tensor([1.0, 0.0, -torch.inf, 2.0, -1.0, -torch.inf]), torch.Generator().manual_seed(0)
    counts = torch.zeros(len(logits))
    for _ in range(10_000):
        counts[draw(logits.clone(), Request(tokens=[1], temperature=0.7), {}, generator)] += 1
    expected = (logits / 0.7).softmax(-1)
    assert counts[2] == counts[5] == 0
    assert ((counts / 10_000 - expected).abs() <= 5 * (expected * (1 - expected) / 10_000).sqrt()).all()
