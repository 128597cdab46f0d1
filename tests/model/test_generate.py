"""generate() in all its forms: beams, chunks, embeddings, continuation, static caches; against tokens taken by hand."""

import pytest
import torch
from tiny import native_twin, prompt, tiny_model
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer

from nemotron_h_hf import HybridCache
from nemotron_h_hf.model.cache import MambaCacheLayer

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}

pytestmark = pytest.mark.usefixtures("no_grad")


def greedy_by_hand(model, ids, steps=12):
    """Without a cache, one full forward per token."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("shape", ["dense", "attention_free", "moe", "latent"])
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 3}])
def test_greedy(shape, how):
    model, ids = tiny_model(shape), prompt(2, 11)
    assert torch.equal(model.generate(ids, **how, **GREEDY), greedy_by_hand(model, ids))


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
def test_cache_implementations(model, kind):
    ids = prompt(2, 11)
    out = model.generate(ids, cache_implementation=kind, disable_compile=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, greedy_by_hand(model, ids))
    assert isinstance(out.past_key_values, HybridCache)
    assert (out.past_key_values.max_cache_len is not None) == (kind == "static")
    with pytest.raises(ValueError, match="cache_implementation='quantized'"):
        model.generate(ids, cache_implementation="quantized", **GREEDY)


def test_static_caches_never_shrink(monkeypatch):
    """A compiled decode step is made for one length of cache; a shorter generation must not ask for another step."""
    model, ids, lengths = tiny_model("dense"), prompt(2, 11), []
    monkeypatch.setattr(model, "_compiles", lambda _: True)
    for steps in (12, 3, 60):
        how = {**GREEDY, "max_new_tokens": steps, "cache_implementation": "static", "disable_compile": True}
        out = model.generate(ids, return_dict_in_generate=True, **how)
        assert torch.equal(out.sequences, greedy_by_hand(model, ids, steps))
        lengths.append(out.past_key_values.max_cache_len)
    assert lengths[0] == lengths[1] < lengths[2]


def test_native_generates_the_same(model):
    ids = prompt(2, 11)
    assert torch.equal(model.generate(ids, **GREEDY), native_twin(model).generate(ids, **GREEDY))


def test_a_users_cache(model):
    ids = prompt(2, 11)
    expected = greedy_by_hand(model, ids)
    caches = (
        HybridCache(model.config),
        HybridCache(model.config, 40),
        DynamicCache(),
        DynamicCache(config=model.config),
    )
    for cache in (*caches, StaticCache(model.config, max_cache_len=40)):
        out = model.generate(ids, past_key_values=cache, disable_compile=True, **GREEDY)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_continue_after_generation(shape):
    model, ids = tiny_model(shape), prompt(2, 11)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, prompt(2, 3, seed=9)], dim=1)
    out = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(out, greedy_by_hand(model, longer))
    chunked = model(ids[:, :6]).past_key_values
    out = model.generate(ids, past_key_values=chunked, prefill_chunk_size=2, **GREEDY)
    assert torch.equal(out, greedy_by_hand(model, ids))


def test_continue_many_times_from_a_fork(model):
    ids = prompt(1, 20)
    cache = model(ids).past_key_values
    for seed in range(3):
        question = torch.cat([ids, prompt(1, 4, seed=seed + 20)], dim=1)
        assert torch.equal(
            model.generate(question, past_key_values=cache.fork(), **GREEDY), greedy_by_hand(model, question)
        )


def test_a_prompt_without_a_new_token_is_refused(model):
    ids = prompt(1, 9)
    for length in (9, 5):
        with pytest.raises(ValueError, match="(cache|past_key_values) holds 9 tokens"):
            model.generate(ids[:, :length], past_key_values=model(ids).past_key_values, **GREEDY)


def test_from_embeddings(model):
    ids = prompt(2, 11)
    embeds = model.get_input_embeddings()(ids)
    expected = greedy_by_hand(model, ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected[:, 11:])
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, **GREEDY), expected)
    assert torch.equal(model.generate(inputs_embeds=embeds, use_cache=False, **GREEDY), expected[:, 11:])


@pytest.mark.parametrize("shape", ["dense", "attention_free"])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}])
def test_beams_with_and_without_a_cache(shape, how):
    model, ids = tiny_model(shape), prompt(2, 9)
    cached = model.generate(ids, **how, **GREEDY)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **how, **GREEDY))
    if shape == "dense":
        static = model.generate(ids, cache_implementation="static", disable_compile=True, **how, **GREEDY)
        assert torch.equal(cached, static)


def test_left_padded_batch_is_each_row_alone(model):
    rows = [prompt(1, length, seed=length) for length in (5, 12, 9)]
    ids = torch.cat([torch.nn.functional.pad(row, (12 - row.shape[1], 0)) for row in rows])
    mask = (ids != 0).long()
    for how in (
        {},
        {"num_beams": 2},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        out = model.generate(ids, attention_mask=mask, **how, **GREEDY)
        for index, row in enumerate(rows):
            alone = model.generate(row, **how, **GREEDY)
            assert torch.equal(out[index, 12:], alone[0, row.shape[1] :]), how


def test_sampling_several_sequences(model):
    torch.manual_seed(0)
    out = model.generate(prompt(1, 7), **{**GREEDY, "do_sample": True, "num_return_sequences": 4})
    assert out.shape == (4, 19) and len({tuple(row) for row in out.tolist()}) > 1


def test_bad_lengths(model):
    with pytest.raises(ValueError, match="2\\*\\*31"):
        model.generate(prompt(1, 5), **{**GREEDY, "max_new_tokens": 2**31})


@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_static_cache_keeps_its_memory_from_call_to_call(shape, monkeypatch):
    """CUDA graphs are captured on addresses: a new cache for every call would need a new capture for every call."""
    model, addresses = tiny_model(shape), []
    monkeypatch.setattr(model, "_compiles", lambda _: True)
    how = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    for length in (11, 5, 20):
        ids = prompt(2, length, seed=length)
        assert torch.equal(model.generate(ids, **how), greedy_by_hand(model, ids))  # nothing is left of the call before
        addresses.append([t.data_ptr() for t in cache_tensors(model._static_cache)])
    assert addresses[0] == addresses[1] == addresses[2] and len(addresses[0]) >= 4


def test_static_cache_in_use_is_left_alone():
    model, ids = tiny_model(), prompt(2, 11)
    how = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    held = model.generate(ids, return_dict_in_generate=True, **how).past_key_values
    before = [t.clone() for t in cache_tensors(held)]
    model.generate(prompt(2, 9, seed=5), **how)
    assert model._static_cache is not held
    assert all(torch.equal(a, b) for a, b in zip(before, cache_tensors(held)))
    with torch.inference_mode():  # whose tensors may not be written to outside of it
        model.generate(ids, **how)
    assert torch.equal(model.generate(ids, **how), greedy_by_hand(model, ids))
    other_rows = prompt(3, 9, seed=7)
    assert torch.equal(model.generate(other_rows, **how), greedy_by_hand(model, other_rows))


def cache_tensors(cache) -> list:
    """Keys, values and states."""
    keys = [t for layer in cache.layers if isinstance(layer, StaticLayer) for t in (layer.keys, layer.values)]
    return keys + [t for layer in cache.layers if isinstance(layer, MambaCacheLayer) for t in layer.tensors()]


def test_lengths_of_static_caches_are_few():
    model, asked, lengths = tiny_model(), GenerationConfig(compile_config=CompileConfig()), set()
    asked.compile_config._compile_all_devices = True
    for needed in range(1, 5000):
        model._previous_max_cache_length = 0
        length = model._static_length(needed, asked)
        assert needed <= length < max(needed + 64, 1.125 * needed + 1)
        lengths.add(length)
    assert len(lengths) < 45
    model._previous_max_cache_length = 0
    asked.max_cache_len = 5003
    assert model._static_length(10, asked) == 5003
    for eager in (GenerationConfig(), GenerationConfig(compile_config=asked.compile_config, disable_compile=True)):
        assert model._static_length(10, eager) == 10  # nothing is compiled: no more than is needed
