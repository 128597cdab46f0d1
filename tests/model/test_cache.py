"""The cache: after anything was cached, cropped, forked, reordered or saved, the logits are those of a fresh run."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from tiny import SHAPES, assert_close, prompt, tiny_config, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionLayer

from nemotron_h_hf import HybridCache, NemotronHConfig
from nemotron_h_hf.model import blocks
from nemotron_h_hf.model.blocks import attend_in_two, attend_lower_right, can_attend_after
from nemotron_h_hf.model.cache import GrowingLayer

pytestmark = pytest.mark.usefixtures("no_grad")


def full_logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


# Feeding


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_steps_equal_one_pass(shape):
    model, ids = tiny_model(shape), prompt(2, 19)
    expected = full_logits(model, ids)
    for cache in (None, HybridCache(model.config), HybridCache(model.config, max_cache_len=24)):
        out = model(ids[:, :7], past_key_values=cache, use_cache=True)
        rows = [out.logits]
        for t in range(7, 19):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
            rows.append(out.logits)
        assert_close(torch.cat(rows, dim=1), expected)
        assert int(out.past_key_values.get_seq_length()) == 19


@pytest.mark.parametrize("max_cache_len", [None, 32])
@pytest.mark.parametrize("parts", [[1, 1, 17], [2, 16, 1], [3, 5, 8, 3], [8, 8, 3], [18, 1], [9, 10]])
def test_chunked_prefill_at_any_split(model, parts, max_cache_len):
    ids, cache = prompt(2, 19), HybridCache(model.config, max_cache_len)
    rows = [model(part, past_key_values=cache).logits for part in ids.split(parts, dim=1)]
    assert_close(torch.cat(rows, dim=1), full_logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_in_two_pieces_is_attention(dtype):
    """Values far from even, each piece wins somewhere; grouped heads, keys in a larger memory."""
    torch.manual_seed(0)
    query, memory = torch.randn(2, 4, 5, 8, dtype=dtype) * 3, torch.randn(2, 2, 2, 30, 8, dtype=dtype)
    key, value = memory[:, :, :, :17]
    mask = torch.ones(5, 17, dtype=torch.bool).tril(12)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))), mask, scale=0.3
    )
    for attend in (attend_in_two, attend_lower_right):
        ours = attend(query, key, value, 0.3).transpose(1, 2)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_where_flash_attention_continues(monkeypatch):
    """Decided from CUDA's properties; no GPU is needed for that."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def ask(device: str, dtype: torch.dtype, head_dim: int = 128) -> bool:
        return can_attend_after(SimpleNamespace(device=torch.device(device), dtype=dtype), head_dim)

    assert ask("cuda", torch.bfloat16) and ask("cuda", torch.float16) and ask("cpu", torch.float32)
    assert not ask("cuda", torch.float32) and not ask("cuda", torch.bfloat16, 512) and not ask("mps", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not ask("cuda", torch.bfloat16)


def test_a_continuation_by_the_gpus_attention(model, monkeypatch):
    monkeypatch.setattr(blocks, "attend_in_two", attend_lower_right)
    ids, cache = prompt(2, 19), HybridCache(model.config)
    rows = [model(part, past_key_values=cache).logits for part in ids.split([3, 5, 8, 3], dim=1)]
    assert_close(torch.cat(rows, dim=1), full_logits(model, ids))


def test_a_continuation_needs_no_mask(model, monkeypatch):
    """With a 2-D mask of ones too; padding anywhere, gradients and the first tokens take the general way."""
    calls, ids = [], prompt(2, 12)
    attend = blocks.attend_in_two
    monkeypatch.setattr(blocks, "attend_in_two", lambda *args: calls.append(1) or attend(*args))
    expected, ones = full_logits(model, ids), torch.ones(2, 12, dtype=torch.long)
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.long), ones], dim=1)
    for mask, first, used in ((None, 4, True), (ones, 4, True), (padded, 5, False)):
        calls.clear()
        rows = ids if mask is not padded else torch.nn.functional.pad(ids, (1, 0), value=3)
        cache = HybridCache(model.config)
        model(rows[:, :first], attention_mask=None if mask is None else mask[:, :first], past_key_values=cache)
        assert not calls
        logits = model(rows[:, first:], attention_mask=mask, past_key_values=cache).logits
        assert bool(calls) == used
        assert_close(logits, expected[:, 4:])


def test_states_are_updated_in_place(model):
    cache = model(prompt(1, 5)).past_key_values
    held = cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]
    model(prompt(1, 1), past_key_values=cache)
    model(prompt(1, 3), past_key_values=cache)
    assert cache.layers[0].conv_states[0] is held[0] and cache.layers[0].recurrent_states[0] is held[1]


def test_keys_grow_in_place(model):
    """Memory is made for a quarter more tokens than there are, and found again after a roll-back; a copy has its own."""
    ids, cache = prompt(2, 30), HybridCache(model.config)
    expected, attention = full_logits(model, ids), model.config.layers_block_type.index("full_attention")
    cache.activate_past_recording()
    model(ids[:, :20], past_key_values=cache)
    address = cache.layers[attention].keys.data_ptr()
    for t in range(20, 24):
        model(ids[:, t : t + 1], past_key_values=cache)
    cache.crop(-3)
    branch = cache.fork()
    for each in (branch, cache, branch):
        length = each.get_seq_length()
        logits = model(ids[:, length : length + 4], past_key_values=each).logits
        assert_close(logits, expected[:, length : length + 4])
    assert cache.layers[attention].keys.data_ptr() == address != branch.layers[attention].keys.data_ptr()


def test_rows_and_gradients_leave_the_memory(model):
    ids, cache = prompt(2, 20), HybridCache(model.config)
    expected = full_logits(model, ids)
    model(ids[:, :12], past_key_values=cache)
    model(ids[:, 12:13], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    flipped = model(ids[:, 13:14].flip(0), past_key_values=cache).logits
    with torch.enable_grad():
        logits = model(ids[:, 14:17].flip(0), past_key_values=cache).logits
    rest = model(ids[:, 17:].flip(0), past_key_values=cache).logits
    assert_close(torch.cat([flipped, logits.detach(), rest], dim=1).flip(0), expected[:, 13:])


def test_states_of_a_bfloat16_model_are_fp32():
    model = tiny_model("dense").bfloat16()
    cache = model(prompt(1, 5)).past_key_values
    model(prompt(1, 1), past_key_values=cache)
    mamba, attention = cache.layers[0], cache.layers[3]
    assert mamba.recurrent_states[0].dtype == torch.float32
    assert attention.keys.dtype == torch.bfloat16


def test_cache_with_gradients():
    """A cached forward may be differentiated, and its cache copied and saved."""
    model, ids = tiny_model("dense"), prompt(1, 12)
    with torch.enable_grad():
        out = model(ids[:, :6], use_cache=True)
        branch = out.past_key_values.fork()
        last = model(ids[:, 6:], past_key_values=out.past_key_values).logits
        cached = torch.autograd.grad(last.square().sum(), model.model.layers[0].mixer.in_proj.weight)[0]
        plain = full_logits(model, ids)[:, 6:]
        expected = torch.autograd.grad(plain.square().sum(), model.model.layers[0].mixer.in_proj.weight)[0]
    assert_close(cached / expected.abs().max(), expected / expected.abs().max())
    assert_close(model(ids[:, 6:], past_key_values=branch).logits, plain.detach())


def test_reset_starts_over(model):
    ids = prompt(2, 9)
    for cache in (HybridCache(model.config), HybridCache(model.config, max_cache_len=16)):
        model(prompt(2, 9, seed=5), past_key_values=cache)
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert_close(model(ids, past_key_values=cache).logits, full_logits(model, ids))


# Rows


@pytest.mark.parametrize("max_cache_len", [None, 32])
@pytest.mark.parametrize("recording", [False, True])
def test_reorder_repeat_select(model, max_cache_len, recording):
    if recording and max_cache_len:
        return
    ids, more = prompt(3, 9), prompt(6, 4, seed=3)
    cache = HybridCache(model.config, max_cache_len)
    if recording:
        cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    rows = ids[[2, 0, 2]]
    if max_cache_len is None:  # transformers' static layers keep their batch
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 5, 1]))
        rows = rows.repeat_interleave(2, dim=0)[[0, 3, 5, 1]]
    more = more[: len(rows)]
    expected = full_logits(model, torch.cat([rows, more], dim=1))[:, 9:]
    assert_close(model(more, past_key_values=cache).logits, expected)
    if recording:
        cache.crop(-6)  # also two of the tokens from before the rows moved
        last = torch.cat([rows[:, 7:], more], dim=1)
        assert_close(model(last, past_key_values=cache).logits[:, 2:], expected)


# Fork, move, file


def test_fork_is_independent(model):
    ids, ends = prompt(1, 12), prompt(3, 5, seed=8)
    cache = model(ids).past_key_values
    for end in ends[:, None]:
        branch = cache.fork()
        expected = full_logits(model, torch.cat([ids, end], dim=1))[:, 12:]
        assert_close(model(end, past_key_values=branch).logits, expected)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("shape", ["dense", "attention_free", "moe"])
@pytest.mark.parametrize("max_cache_len", [None, 32])
def test_file_round_trip(shape, max_cache_len, tmp_path):
    model, ids = tiny_model(shape), prompt(2, 15)
    cache = HybridCache(model.config, max_cache_len)
    model(ids[:, :9], past_key_values=cache)
    path = tmp_path / "prompt.safetensors"
    cache.save(path)
    with pytest.raises(FileExistsError):
        cache.save(path)
    cache.save(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.safetensors"]
    expected = full_logits(model, ids)[:, 9:]
    for room in (None, 20):
        for _ in range(2):
            loaded = HybridCache.load(path, model.config, max_cache_len=room)
            assert int(loaded.get_seq_length()) == 9
            assert_close(model(ids[:, 9:], past_key_values=loaded).logits, expected)
    if shape != "attention_free":
        with pytest.raises(ValueError, match="max_cache_len=8"):
            HybridCache.load(path, model.config, max_cache_len=8)


def test_bad_files(model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    model(prompt(1, 9)).past_key_values.save(path)
    for other in (tiny_config("dense", mamba_head_dim=16), tiny_config("dense", num_key_value_heads=1),
                  tiny_config("dense", conv_kernel=3), tiny_config("attention_free"), tiny_config("moe"),
                  tiny_config("dense", hybrid_override_pattern="M-M-*M-")):  # fmt: skip
        with pytest.raises(ValueError, match="another model|layers"):
            HybridCache.load(path, other)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"\x00" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a safetensors file|cut short|damaged"):
            HybridCache.load(path, model.config)
    model.config.to_json_file(path)
    with pytest.raises(ValueError, match="damaged|not a"):
        HybridCache.load(path, model.config)
    with pytest.raises(FileNotFoundError):
        HybridCache.load(tmp_path / "missing", model.config)


def test_to_cpu_and_memory_bytes():
    config = tiny_config("dense")
    model, length = tiny_model("dense").bfloat16(), 9
    cache = model(prompt(2, length)).past_key_values
    kv = 2 * 2 * config.num_key_value_heads * config.head_dim * length * 2
    conv = 2 * config.conv_dim * config.conv_kernel * 2
    ssm = 2 * config.mamba_intermediate_size * config.ssm_state_size * 4
    mamba_layers = config.layers_block_type.count("linear_attention")
    expected = {"attention": kv, "mamba": mamba_layers * (conv + ssm), "total": kv + mamba_layers * (conv + ssm)}
    assert cache.memory_bytes() == expected
    assert cache.to("cpu").memory_bytes() == expected
    assert HybridCache(config).memory_bytes()["total"] == 0
    static = HybridCache(config, max_cache_len=32)
    model(prompt(2, length), past_key_values=static)
    assert static.memory_bytes()["attention"] == kv // length * 32


# Errors


def test_wrong_caches(model):
    ids = prompt(2, 5)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="another batch"):
        model(ids[:1], past_key_values=cache)
    for other in ("moe", "attention_free"):
        with pytest.raises(ValueError, match="layers"):
            tiny_model(other)(ids, past_key_values=cache)
    for change in ({"head_dim": 8}, {"ssm_state_size": 8}, {"num_key_value_heads": 1}, {"mamba_num_heads": 4}):
        with pytest.raises(ValueError, match="another model"):
            tiny_model("dense", **change)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cache|past_key_values"):
        model(ids, past_key_values=[(torch.zeros(1), torch.zeros(1))])


def test_static_cache_that_is_full(model):
    cache = HybridCache(model.config, max_cache_len=8)
    model(prompt(1, 6), past_key_values=cache)
    with pytest.raises(ValueError, match="max_cache_len=8"):
        model(prompt(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="max_cache_len=4"):
        model(prompt(1, 6), past_key_values=HybridCache(model.config, max_cache_len=4))
    for bad in (0, -1, 2**31):
        with pytest.raises(ValueError, match="max_cache_len"):
            HybridCache(model.config, max_cache_len=bad)


def test_configuration_of_transformers_makes_the_same_cache(model):
    assert isinstance(model.config, NemotronHConfig)
    ids = prompt(2, 13)
    for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=16)):
        rows = [model(part, past_key_values=cache).logits for part in ids.split([8, 1, 4], dim=1)]
        assert_close(torch.cat(rows, dim=1), full_logits(model, ids))


@pytest.mark.parametrize("shape", ["dense", "attention_free"])
def test_a_dynamic_cache_can_be_rolled_back_too(shape):
    model, ids = tiny_model(shape), prompt(1, 12)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        cache.activate_past_recording()
        model(ids[:, :8], past_key_values=cache)
        if cache.layers[0].record_past:
            model(prompt(1, 3, seed=9), past_key_values=cache)
            cache.crop(-3)
            assert_close(model(ids[:, 8:], past_key_values=cache).logits, full_logits(model, ids)[:, 8:])


@torch.no_grad()
def test_the_first_row_as_a_view_leaves_the_memory():
    layer, (keys, more) = GrowingLayer(), torch.randn(2, 2, 3, 9, 4)
    layer.update(keys, keys)
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    grown, _ = layer.update(more[:1], more[:1])
    assert torch.equal(grown, torch.cat([keys[:1], more[:1]], dim=2))


def test_tools_that_ask_by_class_know_the_cache():
    config = tiny_config("dense")
    growing, static = HybridCache(config), HybridCache(config, 32)
    assert isinstance(growing, DynamicCache) and not isinstance(growing, StaticCache)
    assert isinstance(static, StaticCache) and not isinstance(static, DynamicCache)
    for cache in (growing, static):
        assert isinstance(cache, HybridCache) and type(cache.fork()) is type(cache)
        assert type(pickle.loads(pickle.dumps(cache))) is type(cache)
        mamba = [l for l, kind in zip(cache.layers, config.layers_block_type) if kind == "linear_attention"]
        assert mamba and all(isinstance(layer, LinearAttentionLayer) for layer in mamba)
