"""Stages, draws and targets of elastic training."""

import pytest
from tiny import tiny_config

from nemotron_h_hf.elastic.train.budget_targets import parse_target, targets_of
from nemotron_h_hf.elastic.train.choices import axes_of
from nemotron_h_hf.elastic.train.curriculum import draw, stage_at, stages_of

NAMES = ["12b", "9b", "6b"]
PAPER = [{"until": "60%", "sequence_length": 8192}, {"weights": {"12b": 0.5, "9b": 0.3, "6b": 0.2}}]


def test_stages_of_the_paper():
    first, second = stages_of(PAPER, NAMES, 110_000, 49152)
    assert (first.until_tokens, first.weights, first.sequence_length) == (66_000, (1, 1, 1), 8192)
    assert (second.until_tokens, second.weights, second.sequence_length) == (110_000, (0.5, 0.3, 0.2), 49152)
    assert [stage_at((first, second), tokens) is second for tokens in (0, 65_999, 66_000, 200_000)] == [False] * 2 + [
        True
    ] * 2
    assert stages_of(None, NAMES, 10, 4)[0].weights == (1, 1, 1)


@pytest.mark.parametrize("entries, message", [
    ([{"until": "60%"}], r"stages\[0\].until='60%': allowed is none"),
    ([{}, {}], r"stages\[0\].until=None"),
    ([{"until": 90}, {"until": 50}, {}], r"stages\[1\].until=50: allowed is 90 to"),
    ([{"sequence_length": 5000}], r"stages\[0\].sequence_length=5000: allowed is a divisor"),
    ([{"weights": {"4b": 1}}], r"stages\[0\].weights='4b': allowed is 12b, 9b, 6b"),
    ([{"weights": {"9b": -1}}], r"weights.9b=-1"),
    ([{"weights": {"9b": 0}}], r"one above 0"),
    ([{"wieghts": {}}], r"='wieghts'"),
])  # fmt: skip
def test_stages_that_make_no_sense_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        stages_of(entries, NAMES, 100, 8192)


def test_draws_follow_the_weights_and_nothing_but_their_arguments():
    axes = axes_of(tiny_config(), {"hidden_size": [32]})
    draws = [draw((0.5, 0.3, 0.2), axes, 0.25, 3, step, micro) for step in range(500) for micro in range(2)]
    counts = [sum(d.budget == budget for d in draws) / 1000 for budget in range(3)]
    assert counts == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    assert sum(d.hard for d in draws) / 1000 == pytest.approx(0.25, abs=0.05)
    again = draw((0.5, 0.3, 0.2), axes, 0.25, 3, 499, 1)
    assert again[:2] == draws[-1][:2] and again.noise["hidden_size"].equal(draws[-1].noise["hidden_size"])
    assert not draw((1,), axes, 0.25, 4, 0, 0).noise["hidden_size"].equal(draws[0].noise["hidden_size"])


@pytest.mark.parametrize("value, metric, expected", [
    (0.75, "parameters", 9e9), ("75%", "parameters", 9e9), ("0.75", "parameters", 9e9), ("8.9B", "parameters", 8.9e9),
    (1, "parameters", 12e9), (6_000_000_000, "parameters", 6e9), ("6e9", "parameters", 6e9),
    ("8GiB", "memory", 2**33), ("500 MB", "memory", 5e8), (0.5, "memory", 6e9),
])  # fmt: skip
def test_targets_are_shares_or_sizes(value, metric, expected):
    assert parse_target(value, metric, 12e9, "budgets.x") == expected


def test_times_are_targets_too():
    assert parse_target("30ms", "latency", 0.04, "x") == pytest.approx(0.03)
    assert parse_target(0.5, "latency", 0.04, "x") == 0.02


@pytest.mark.parametrize("value", ["13B", 0, "much", "8GiB", "-5%", 1.5e10])
def test_sizes_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="budgets.x=.*: allowed is"):
        parse_target(value, "parameters", 12e9, "budgets.x")


def test_one_budget_is_the_parent_and_comes_first():
    assert list(targets_of({"6b": 0.5, "12b": 1.0, "9b": 0.75}, "parameters", 12e9)) == NAMES
    for budgets, message in (({"6b": 0.5}, "just one is the parent"), ({"12b": 1.0}, "one that is smaller"),
                             ({}, "a mapping"), ({"a": 1.0, "b": "100%", "c": 0.5}, "just one")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            targets_of(budgets, "parameters", 12e9)


def test_a_sandwich_has_the_largest_and_the_smallest():
    axes = axes_of(tiny_config(), {"hidden_size": [32]})
    drawn = [[draw((1, 1, 2), axes, 0.0, 0, step, k, sandwich=True).budget for k in range(4)] for step in range(50)]
    assert all(step[:2] == [0, 2] for step in drawn) and {budget for step in drawn for budget in step[2:]} == {0, 1, 2}
    assert [step[2:] for step in drawn] == [
        [draw((1, 1, 2), axes, 0.0, 0, step, k).budget for k in (2, 3)] for step in range(50)
    ]
