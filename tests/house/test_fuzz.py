"""A short run of the fuzzer (`make fuzz` is the long one): nothing silent, nothing bare, no hang."""

import logging

import pytest
from fuzz.__main__ import FAULTS, fuzz
from fuzz.areas import AREAS
from fuzz.judge import Refused, judge

COUNTS = {"megatron": 12, "trainer": 6, "commands": 12}


@pytest.mark.parametrize("name", AREAS)
def test_damage_is_refused_or_harmless(name):
    logging.disable(logging.ERROR)
    try:
        counts, faults = fuzz(name, seed=20, numbers=range(COUNTS.get(name, 40)))
    finally:
        logging.disable(logging.NOTSET)
    assert not faults and not any(counts[kind] for kind in FAULTS)
    assert counts["clear"] > 0


def raises(error):
    raise error


@pytest.mark.parametrize(
    "run, kind",
    [
        (lambda: 1, "right"),
        (lambda: 2, "silent"),
        (lambda: raises(ValueError("a.json is damaged")), "clear"),
        (lambda: raises(ValueError("something")), "bare"),
        (lambda: raises(KeyError("a.json")), "bare"),
        (lambda: raises(Refused("nemotron-h info: error: unexpected KeyError: 'x' (... --debug shows where)")), "bare"),
    ],
)
def test_the_judge_tells_them_apart(run, kind):
    assert judge(run, 1, ("a.json",)).kind == kind
