"""The next-token loss in chunks: transformers' loss and gradients, without the logits of the whole batch."""

import pytest
import torch
import torch.utils._pytree as pytree
from test_modeling import assert_same_gradients, gradients
from test_ssd import LargestTensor
from tiny import assert_close, prompt, tiny_model
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
        out = model(ids, labels=ids, skip_logits=True, use_cache=False)
        if training:
            out.loss.backward()
    assert largest.numel < 2 * 500 * vocab / 4


@pytest.mark.parametrize("shape", ["dense", "moe"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_are_in_every_form_of_output_or_in_none(shape, training):
    """In training as in evaluation: the attribute, the key, the index, the tuple, torch's tree of tensors."""
    model, ids = tiny_model(shape).train(training), prompt(2, 21)
    expected = model(ids).logits
    for default in (False, True):
        model.skip_logits = default
        for asked in (None, False, True):
            out = model(ids, labels=ids, skip_logits=asked, use_cache=False)
            as_tuple = model(ids, labels=ids, skip_logits=asked, use_cache=False, return_dict=False)
            skipped = default if asked is None else asked
            forms = [out.logits, out.get("logits"), pytree.tree_map(lambda t: t, out).logits]
            if skipped:
                assert forms == [None] * 3 and "logits" not in out and len(out) == len(as_tuple) == 1
            else:
                forms += [out["logits"], out[1], out.to_tuple()[1], as_tuple[1]]
                assert all(torch.equal(form, forms[0]) for form in forms)
                assert_close(forms[0], expected, 0)
            assert not any(callable(value) for value in vars(out).values())
        assert model(ids, use_cache=False).logits is not None  # without a loss there is nothing else


def test_logits_have_gradients_and_stay_after_a_step():
    model, ids = tiny_model().train(), prompt(2, 21)
    out = model(ids, labels=ids)
    before = out.logits.detach().clone()
    (out.loss + out.logits.square().mean()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(out.logits, before) and not torch.equal(model(ids).logits, before)


def test_lm_head_runs_once_for_logits_and_loss():
    model, ids, calls = tiny_model(), prompt(2, 21), []
    model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    expected = ForCausalLMLoss(model(ids).logits, ids, 97)
    assert_close(model(ids, labels=ids).loss, expected, 5e-6)
    assert_close(model(ids, labels=ids, skip_logits=True).loss, expected, 5e-6)
    assert calls == [(2, 21, 97), (2, 21, 97), (42, 97)]
    out = model(ids, labels=ids, logits_to_keep=3)
    assert_close(out.loss, expected, 5e-6)
    assert out.logits.shape == (2, 3, 97)


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
    out = model(ids, loss_from_hidden=squares, skip_logits=True, **aux)
    assert_close(out.loss, logits.square().mean() + (0.25 * out.aux_loss if aux else 0.0), 1e-6)
    assert out.logits is None
    assert_close(model(ids, loss_from_hidden=squares, **aux).logits, logits, 0)
