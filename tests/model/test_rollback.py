"""Rolling recurrent state back: crop and commit equal a fresh run, generation that guesses ahead the greedy text."""

import pytest
import torch
from tiny import prompt, tiny_model
from transformers import DynamicCache

from nemotron_h_hf import HybridCache
from nemotron_h_hf.model import cache as cache_module

pytestmark = pytest.mark.usefixtures("no_grad")


def recording(model):
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    return cache


def check_random_walk(model, cache, batch, steps, longest, seed, window):
    """Forward, crop and commit at random; at every forward the logits are those of a run over the same columns."""
    generator = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    ids, mask, since = torch.zeros(batch, 0, dtype=torch.long), torch.zeros(batch, 0, dtype=torch.long), 0
    for step in range(steps):
        length = number(1, longest) if number(0, 2) else 1
        new = prompt(batch, length, seed=seed * 1000 + step)
        real = (torch.rand(batch, length, generator=generator) < 0.7).long() if batch > 1 else torch.ones_like(new)
        if step == 0:
            real[:, -1] = 1
        ids, mask, since = torch.cat([ids, new], 1), torch.cat([mask, real], 1), since + length
        given = mask if batch > 1 else None
        logits = model(new, attention_mask=given, past_key_values=cache).logits
        expected = model(ids, attention_mask=given, use_cache=False).logits[:, -length:]
        visible = real.bool()
        torch.testing.assert_close(logits[visible], expected[visible], rtol=0, atol=1e-4)
        action = number(0, 3)
        if action < 2:
            removed = number(0, min(since, window, ids.shape[1] - 1))
            cache.crop(-removed)
            ids, mask, since = ids[:, : ids.shape[1] - removed], mask[:, : mask.shape[1] - removed], 0
        assert int(cache.get_seq_length()) == ids.shape[1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_random_forwards_crops_and_commits(shape, batch, seed):
    model = tiny_model(shape)
    check_random_walk(model, recording(model), batch, steps=12, longest=9, seed=seed, window=10**6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("batch", [1, 3])
def test_more_tokens_than_the_record_holds(model, batch, seed, monkeypatch):
    monkeypatch.setattr(cache_module, "RECORDED_TOKENS", 8)
    check_random_walk(model, recording(model), batch, steps=14, longest=30, seed=seed, window=8)


def test_a_long_prompt_with_left_padding_then_crop(model):
    """The record is cut inside a padded prompt."""
    ids, mask = prompt(2, 700), torch.ones(2, 700, dtype=torch.long)
    mask[0, :130] = 0
    cache = recording(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-200)
    logits = model(ids[:, 500:], attention_mask=mask, past_key_values=cache).logits
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 500:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("removed", [[0, 3, 1], [2, 4, 3], [5, 0, 5]])
@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_rows_that_lose_different_numbers(shape, removed):
    """What a row lost is padding: the tokens after it get the logits of a run without them."""
    model, ids = tiny_model(shape), prompt(3, 16)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[0, :2] = 0
    cache = HybridCache(model.config)
    model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
    cache.activate_past_recording()
    model(ids[:, 7:12], attention_mask=mask[:, :12], past_key_values=cache)
    cache.crop_rows(torch.tensor(removed))
    end = 12 - min(removed)
    assert int(cache.get_seq_length()) == end
    for row, lost in enumerate(removed):
        mask[row, 12 - lost : end] = 0
    ids, mask = torch.cat([ids[:, :end], ids[:, 12:]], dim=1), torch.cat([mask[:, :end], mask[:, 12:]], dim=1)
    logits = model(ids[:, end:], attention_mask=mask, past_key_values=cache).logits
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row][real][None], use_cache=False).logits[0, -4:]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-4)


def test_record_is_bounded(model):
    cache, sizes = recording(model), []
    for seed in range(8):
        model(prompt(1, 300, seed=seed), past_key_values=cache)
        sizes.append(cache.memory_bytes()["mamba"])
        for layer in cache.layers:
            if isinstance(layer, cache_module.MambaCacheLayer):
                stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.tensors()}
                assert sum(stored.values()) <= 1.01 * sum(t.nbytes for t in layer.tensors())
                assert layer.recorded["real"].shape[1] <= 2 * cache_module.RECORDED_TOKENS
    assert max(sizes) == max(sizes[:2]) or max(sizes[2:]) <= max(sizes[:2]) * 1.8
    before = cache.memory_bytes()["mamba"]
    cache.crop(0)
    assert cache.memory_bytes()["mamba"] < before / 4


def test_crop_that_is_not_possible_changes_nothing(model):
    ids = prompt(1, 9)
    plain = model(ids[:, :6]).past_key_values
    with pytest.raises(ValueError, match="activate_past_recording"):
        plain.crop(-1)
    assert plain.get_seq_length() == 6
    cache = recording(model)
    model(ids[:, :6], past_key_values=cache)
    for bad in (1, -7):
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(bad)
    cache.crop(-1)
    with pytest.raises(ValueError, match="recorded since the last crop"):
        cache.crop(-1)
    for kept in (plain, cache):
        length = kept.get_seq_length()
        expected = model(ids, use_cache=False).logits[:, length:]
        torch.testing.assert_close(model(ids[:, length:], past_key_values=kept).logits, expected, rtol=0, atol=2e-5)
    static = HybridCache(model.config, max_cache_len=16)
    static.activate_past_recording()
    model(ids, past_key_values=static)
    with pytest.raises(ValueError, match="static"):
        static.crop(-1)


def test_crop_of_everything(model):
    ids, cache = prompt(1, 9), recording(model)
    model(prompt(1, 4, seed=7), past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 0
    logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=0, atol=2e-5)


def test_fork_and_move_keep_the_record(model):
    ids, cache = prompt(1, 12), recording(model)
    model(ids, past_key_values=cache)
    branch = cache.fork().to("cpu")
    model(prompt(1, 5, seed=4), past_key_values=cache)
    branch.crop(-4)
    expected = model(ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(model(ids[:, 8:], past_key_values=branch).logits, expected, rtol=0, atol=2e-5)


# Generation that guesses ahead

GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("shape", ["dense", "attention_free", "moe"])
@pytest.mark.parametrize("assistant_seed", [0, 1])
def test_assisted_generation_is_greedy(shape, assistant_seed):
    model, assistant = tiny_model(shape), tiny_model(shape, seed=assistant_seed)
    ids = prompt(1, 11)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)


@pytest.mark.parametrize("places", [[0, 1], [3, 4, 5], [10], [0, 4, 9, 10]], ids=["left", "middle", "right", "all"])
def test_assisted_generation_with_padding(places):
    """transformers counts positions on from those of padding, which must not look like a packed document."""
    model, assistant, ids = tiny_model("dense"), tiny_model("dense", seed=1), prompt(1, 11)
    mask = torch.ones_like(ids)
    mask[:, places] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for how in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **how, **GREEDY), expected)


@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_prompt_lookup_is_greedy(shape):
    model, ids = tiny_model(shape), prompt(1, 6).repeat(1, 4)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY), expected)
    repeated = torch.cat([ids, expected[:, 24:40], ids, expected[:, 24:30]], dim=1)
    plain = model.generate(repeated, **GREEDY)
    assert torch.equal(model.generate(repeated, prompt_lookup_num_tokens=5, **GREEDY), plain)


def test_assisted_generation_takes_an_empty_cache_only(model):
    """transformers feeds the cached prompt a second time, for every model: a wrong text without a word."""
    ids = prompt(1, 14)
    expected = model.generate(ids, **GREEDY)
    for cache in (HybridCache(model.config), DynamicCache(config=model.config), DynamicCache()):
        out = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
        assert torch.equal(out, expected)
        with pytest.raises(ValueError, match="not empty"):
            model.generate(out, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
