"""The teacher in the order of its scores: the same function, and for controls another order of neurons alone."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt, tiny_model

from nemotron_h_hf.compression.importance import WidthScores, accumulate, importance_of
from nemotron_h_hf.elastic.budgets import CHOICE_FIELDS, EXPERT_FIELDS
from nemotron_h_hf.minipuzzle.memory_image import MemoryImage, order_of

pytestmark = pytest.mark.usefixtures("no_grad")


def scored(shape: str):
    model = tiny_model(shape)
    scores = WidthScores.empty()
    for _ in accumulate(model, [{"input_ids": prompt(2, 13)}], scores):
        pass
    return model, scores


@pytest.mark.parametrize("shape", ["dense", "moe"])
@pytest.mark.parametrize("rule", ["importance", "reversed", "random:3"])
def test_every_order_is_the_same_function(shape, rule):
    model, scores = scored(shape)
    ids = prompt(2, 9)
    expected = model(ids).logits
    fields = set(CHOICE_FIELDS) - (set() if shape == "moe" else set(EXPERT_FIELDS))
    image = MemoryImage.of(model, order_of(model.config, scores, fields, rule), rule)
    torch.testing.assert_close(image.parent(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_first_neurons_are_the_most_important_ones():
    model, scores = scored("dense")
    values = importance_of(model.config, scores).neurons[1]
    orders = {rule: order_of(model.config, scores, {"intermediate_size"}, rule).neurons[1] for rule in
              ("importance", "reversed", "random:0", "random:1")}  # fmt: skip
    best = values[orders["importance"]]
    assert bool((best.diff() <= 0).all()) and orders["reversed"].tolist() == orders["importance"].flip(0).tolist()
    assert all(sorted(order.tolist()) == list(range(80)) for order in orders.values())
    assert orders["random:0"].tolist() != orders["random:1"].tolist()


def test_only_what_is_asked_for_is_reordered():
    model, scores = scored("dense")
    order = order_of(model.config, scores, {"intermediate_size"})
    assert order.hidden.tolist() == list(range(48)) and order.heads[0].tolist() == list(range(8))
