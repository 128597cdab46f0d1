"""Arguments of forwards: both names of the cache give one result, unknown ones are refused, those on the list are taken."""

import inspect
import warnings

import pytest
import torch
from test_generate import GREEDY, greedy_by_hand
from tiny import prompt, tiny_model
from transformers import DynamicCache
from transformers.utils import logging

from nemotron_h_hf import HybridCache, NemotronHForSequenceClassification
from nemotron_h_hf.model.arguments import CACHE_NAME, CACHE_NAMES, PASSED_BY_CALLERS, cache_of

VALUES = {"is_causal": True, "num_items_in_batch": 7, "token_type_ids": torch.zeros(2, 9, dtype=torch.long)}

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("shape", ["dense", "attention_free", "moe"])
def test_both_names(name, shape):
    model, ids = tiny_model(shape), prompt(2, 11)
    expected = model(ids, use_cache=False).logits
    for forward in (model, model.model):
        cache = HybridCache(model.config)
        forward(ids[:, :6], **{name: cache})
        output = forward(ids[:, 6:], **{name: cache})
        assert output[CACHE_NAME] is cache_of(output) is cache and int(cache.get_seq_length()) == 11
        if forward is model:
            torch.testing.assert_close(output.logits, expected[:, 6:], rtol=1e-4, atol=1e-4)
    other = tuple(model(ids, return_dict=False))
    assert isinstance(other[1], HybridCache)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", ["hybrid", "static", "transformers"])
def test_generate_from_a_given_cache(model, name, kind):
    make = {
        "hybrid": lambda: HybridCache(model.config),
        "static": lambda: HybridCache(model.config, max_cache_len=64),
        "transformers": lambda: DynamicCache(config=model.config),
    }
    ids, cache = prompt(2, 11), make[kind]()
    assert torch.equal(model.generate(ids, **{name: cache}, disable_compile=True, **GREEDY), greedy_by_hand(model, ids))
    assert int(cache.get_seq_length()) == 22
    longer = torch.cat([greedy_by_hand(model, ids), prompt(2, 3)], dim=1)
    assert torch.equal(
        model.generate(longer, **{name: cache}, disable_compile=True, **GREEDY), greedy_by_hand(model, longer)
    )


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_classifier_and_masks_and_layers(name):
    model, ids = (
        tiny_model("dense", model_class=NemotronHForSequenceClassification, num_labels=3, pad_token_id=0),
        prompt(2, 9),
    )
    cache = HybridCache(model.config)
    model(ids[:, :5], **{name: cache})
    torch.testing.assert_close(model(ids[:, 5:], **{name: cache}).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    language_model = tiny_model("dense")
    masks = language_model.create_masks_for_generate(
        model.config, torch.empty(2, 3, 0), torch.ones(2, 12), **{name: None}
    )
    assert set(masks) == {"full_attention", "linear_attention"}
    x = torch.randn(2, 4, model.config.hidden_size)
    for block in language_model.model.layers:
        block(x, **{name: HybridCache(model.config)})


def test_two_different_caches_are_refused(model):
    one, other = HybridCache(model.config), HybridCache(model.config)
    for call in (model, model.model, lambda ids, **caches: model.generate(ids, **caches, **GREEDY)):
        with pytest.raises(ValueError, match="cache and past_key_values"):
            call(prompt(1, 5), cache=one, past_key_values=other)
    assert model(prompt(1, 5), cache=one, past_key_values=one)[CACHE_NAME] is one


def test_nothing_is_warned_of(model, capfd):
    """transformers 5.24 warns of the old name; ours are no calls of it."""
    logging.warning_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in CACHE_NAMES:
            cache = HybridCache(model.config)
            model(prompt(1, 5), **{name: cache})
            model.generate(prompt(1, 6), **{name: cache}, **GREEDY)
    assert "deprecated" not in "".join(capfd.readouterr())


def parts(model):
    """Every kind of model, block and mixer with an input for it."""
    x, ids = torch.randn(2, 9, model.config.hidden_size), prompt(2, 9)
    yield from ((model, ids), (model.model, ids))
    for block in model.model.layers:
        yield from ((block, x), (block.mixer, x))


@pytest.mark.parametrize("shape", ["dense", "moe", "latent"])
@pytest.mark.parametrize(
    "name", ["past_key_value", "attention_masks", "head_mask", "num_logits_to_keep", "cache_params"]
)
def test_unknown_arguments_are_refused(shape, name):
    for part, x in parts(tiny_model(shape)):
        with pytest.raises(TypeError, match=name):
            part(x, **{name: None})


def test_masks_refuse_an_unknown_argument(model):
    """It may be the cache under a new name; what transformers passes to makers of masks is known."""
    x = torch.zeros(2, 3, 0)
    assert model.create_masks_for_generate(model.config, x, None, is_first_iteration=True)["linear_attention"] is None
    with pytest.raises(TypeError, match="kv_cache"):
        model.create_masks_for_generate(model.config, x, None, kv_cache=None)


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_listed_arguments_change_nothing(shape):
    model, ids = tiny_model(shape), prompt(2, 9)
    expected = model(ids).logits
    for name in PASSED_BY_CALLERS:
        output = model(ids, **{name: VALUES.get(name, True)})
        assert torch.equal(output.logits, expected), name
    with pytest.raises(ValueError, match="is_causal"):
        model(ids, is_causal=False)
    for name in ("cache", "past_key_values"):
        assert name in inspect.signature(model.forward).parameters


def test_tuples_by_the_configuration():
    """`config.return_dict = False` is read once, by the forward that was called."""
    model, ids = tiny_model("dense"), prompt(2, 9)
    expected = model(ids, labels=ids, return_dict=False)
    model.config.return_dict = False
    output = model(ids, labels=ids)
    assert type(output) is tuple and len(output) == len(expected) and torch.equal(output[1], expected[1])


def test_a_classifiers_tuples_by_the_configuration():
    model, ids = tiny_model(model_class=NemotronHForSequenceClassification, pad_token_id=0, num_labels=3), prompt(2, 9)
    expected = model(ids, labels=torch.tensor([0, 2]))
    for asked in ({"return_dict": False}, {}):
        output = model(ids, labels=torch.tensor([0, 2]), **asked)
        assert type(output) is tuple if asked else torch.equal(output.loss, expected.loss)
    model.config.return_dict = False
    output = model(ids, labels=torch.tensor([0, 2]))
    assert type(output) is tuple and torch.equal(output[0], expected.loss) and torch.equal(output[1], expected.logits)
    assert torch.equal(model(ids, return_dict=True).logits, expected.logits)
