"""The next-token loss in chunks: transformers' loss and gradients, without the logits of the whole batch."""

import pytest
import torch
from test_modeling import assert_close, assert_same_gradients, gradients
from test_ssd import LargestTensor
from tiny import prompt, tiny_model
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import find_labels

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.model import loss as loss_module


def labels_of(ids):
    labels = ids.clone()
    labels[0, 3:9], labels[1, :2] = -100, -100
    return labels


@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(23)])
@pytest.mark.parametrize("positions_per_chunk, kept", [(1, False), (5, False), (5, True), (10**6, True)])
def test_loss_and_gradients_are_transformers(num_items, positions_per_chunk, kept, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", positions_per_chunk * 97)
    monkeypatch.setattr(loss_module, "KEPT_LOGITS", 10**9 if kept else 0)
    model, ids = tiny_model(), prompt(2, 21)
    labels = labels_of(ids)
    logits = model(ids).logits
    expected = ForCausalLMLoss(logits, labels, 97, num_items_in_batch=num_items)
    wanted = gradients(model, expected)
    for training in (False, True):
        model.train(training)
        loss = model(ids, labels=labels, num_items_in_batch=num_items).loss
        assert_close(loss, expected, 5e-6)
        assert_same_gradients(gradients(model, loss), wanted)
    with torch.no_grad():
        assert_close(model(ids, labels=labels, num_items_in_batch=num_items).loss, expected, 5e-6)


def test_shifted_labels():
    model, ids = tiny_model(), prompt(2, 21)
    labels = labels_of(ids)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert_close(model(ids, shift_labels=shifted).loss, model(ids, labels=labels).loss, 0)


def test_trainer_asks_for_no_other_labels():
    """transformers' Trainer evaluates a batch without a loss unless all that this finds is in it."""
    assert find_labels(NemotronHForCausalLM) == ["labels"]


@pytest.mark.parametrize("training", [False, True])
def test_logits_of_the_whole_batch_never_exist(training, monkeypatch):
    vocab = 4096
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 16 * vocab)
    monkeypatch.setattr(loss_module, "KEPT_LOGITS", 32 * vocab)
    model, ids = tiny_model(vocab_size=vocab), prompt(2, 500)
    model.train()
    with torch.set_grad_enabled(training), LargestTensor() as largest:
        out = model(ids, labels=ids, use_cache=False)
        if training:
            out.loss.backward()
    assert largest.numel < 2 * 500 * vocab / 4


def test_logits_are_made_when_they_are_read():
    model, ids = tiny_model(), prompt(2, 21)
    expected = model(ids, labels=ids)
    calls = []
    model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    skipped = model(ids, labels=ids, skip_logits=True)
    assert len(calls) == 1
    assert_close(skipped.loss, expected.loss, 0)
    assert_close(skipped.logits, expected.logits, 0)
    assert skipped.logits is skipped["logits"] and len(calls) == 2
    model.train()
    out = model(ids, labels=ids)
    assert len(calls) == 3
    out.logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model(ids, labels=ids, skip_logits=False)["logits"] is not None
    assert model(ids)["logits"].shape == (2, 21, 97)


def test_a_bfloat16_loss_is_fp32():
    model, ids = tiny_model().bfloat16(), prompt(2, 21)
    out = model(ids, labels=ids)
    assert out.loss.dtype == torch.float32
    assert_close(out.loss, ForCausalLMLoss(out.logits, ids, 97), 1e-5)


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_another_loss_inside_forward(shape):
    model, ids = tiny_model(shape, router_aux_loss_coef=0.25), prompt(2, 21)
    logits = model(ids).logits

    def squares(hidden_states, lm_head):
        return lm_head(hidden_states).square().mean()

    aux = {"output_router_logits": True} if shape == "moe" else {}
    out = model(ids, loss_from_hidden=squares, **aux)
    assert_close(out.loss, logits.square().mean() + (0.25 * out.aux_loss if aux else 0.0), 1e-6)
    assert dict.get(out, "logits") is None
    assert_close(out.logits, logits, 0)
