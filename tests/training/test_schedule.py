"""The learning rate by tokens: against the formula written out, and transformers' own schedule."""

import math

import pytest
import torch
from transformers import get_wsd_schedule

from nemotron_h_hf.training.schedule import Schedule, scheduler


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_formula(shape):
    schedule = Schedule(1000, 100, 300, min_ratio=0.1, shape=shape)
    for tokens in range(0, 1001, 10):
        if tokens <= 100:
            expected = tokens / 100
        elif tokens <= 700:
            expected = 1.0
        elif shape == "linear":
            expected = 1.0 - 0.9 * (tokens - 700) / 300
        else:
            expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (tokens - 700) / 300))
        assert schedule.factor(tokens) == pytest.approx(expected, abs=1e-12), tokens
    assert schedule.factor(5000) == pytest.approx(0.1)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_same_decay_as_transformers(shape):
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    lambdas = get_wsd_schedule(theirs, 10, 30, num_training_steps=100, decay_type=shape, min_lr_ratio=0.01).lr_lambdas
    schedule = Schedule(100 * 64, 10 * 64, 30 * 64, min_ratio=0.01, shape=shape)
    for step in range(10, 101):
        assert schedule.factor(step * 64) == pytest.approx(lambdas[0](step), abs=1e-12), step


def test_steps_of_an_optimizer():
    """A step has the rate of the tokens seen when it ends: none is wasted at zero, the last has the least."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    rates, steps = [], scheduler(optimizer, Schedule(80, 20, 40, min_ratio=0.25), tokens_per_step=10)
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.625, 1.25, 0.875, 0.5])


def test_a_run_may_be_lengthened_until_its_decay_begins():
    short, long = Schedule(1000, 100, 300), Schedule(2000, 100, 300)
    assert all(short.factor(tokens) == long.factor(tokens) for tokens in range(0, 701))
    assert short.factor(701) < long.factor(701)


def test_without_warmup_or_decay():
    assert [Schedule(100, 0, 0).factor(tokens) for tokens in (0, 1, 100, 101)] == [1.0] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((100, 101, 0), "warmup_tokens=101"),
        ((100, 60, 50), "together at most"),
        ((100, 10, -1), "decay_tokens=-1"),
        ((100, 0, 0, 1.5), "min_ratio=1.5"),
        ((100, 0, 0, 0.1, "square"), "shape='square': allowed are linear, cosine"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*fields)
