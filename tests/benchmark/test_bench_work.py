"""What a GPU benchmark holds its timings against: costs, predicted memory, shapes of peers, the search for a batch."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nemotron_h_hf import HybridCache, NemotronHConfig, NemotronHForCausalLM, cost
from nemotron_h_hf.benchmark import models, work
from nemotron_h_hf.benchmark.caches import RoomyGrowingLayer, empty_cache, prefill
from nemotron_h_hf.benchmark.gate import random_ids
from nemotron_h_hf.benchmark.largest import largest_batch
from nemotron_h_hf.model import blocks

CPU = torch.device("cpu")
WIDE = {
    "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 64, "vocab_size": 64,
}  # fmt: skip


def side(name: str, dtype: torch.dtype = torch.float32) -> models.Side:
    config = models.read_config(models.TINY, None)
    if name in models.PEERS:
        return models.build_peer(name, config, config, dtype, CPU)
    if name == "moe":
        return models.build_ours(tiny_config("moe"), dtype, CPU)
    return models.build_ours(config, dtype, CPU)


@pytest.mark.parametrize("name", ["ours", "moe", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_model(name, dtype):
    model = side(name, dtype)
    tensors = [*model.model.parameters(), *model.model.buffers()]
    rotary = [b for buffer, b in model.model.named_buffers() if "inv_freq" in buffer]
    assert model.costs.weight_bytes == sum(t.nbytes for t in tensors) - sum(t.nbytes for t in rotary)
    cache = empty_cache(model, 48, static=False)
    prefill(model.model, random_ids(model.model, 2, 48), cache)
    keys = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    assert 2 * 48 * model.costs.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in keys)
    states = cache.memory_bytes()["mamba"] if isinstance(cache, HybridCache) else 0
    assert 2 * model.costs.state_bytes == states


@pytest.mark.parametrize("name", ["ours", "llama", "qwen2"])
def test_operations_are_those_of_the_model(name):
    """Products with weights, counted by torch; what depends on the context, by its slope."""
    model = side(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(random_ids(model.model, 2, 64), use_cache=False, logits_to_keep=1)
    products = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    _, flops = model.costs.prefill(2, 64)
    beside = 64 * 65 / 2 * 2 * model.costs.pair_flops  # attention
    if name == "ours":
        parts = cost.forward_flops_per_token(model.config, model.config.chunk_size)
        beside += 2 * 64 * (parts["scan"] + parts["conv"])
    assert flops - beside == products
    longer = model.costs.decode(1, 101)[1] - model.costs.decode(1, 100)[1]
    layers = 1 if name == "ours" else model.config.num_hidden_layers
    assert longer == layers * 4 * model.config.num_attention_heads * 16


def test_floor_of_the_8b():
    """By hand: 15.1 GiB of weights without the embeddings' 1 GiB, 16 KiB per token, 97.9 MiB of states read and written."""
    costs = work.costs_of(NemotronHConfig.from_preset("nemotron-h-8b"), "bfloat16")
    num_bytes, flops = costs.decode(64, 16384)
    expected = 2 * (8_100_852_736 - 131072 * 4096) + 64 * (16384 * 16384 + 2 * costs.state_bytes)
    assert num_bytes == expected and costs.state_bytes == (96 << 20) + 24 * 10240 * 4 * 2
    assert 64 * 2 * 7.5e9 < flops < 64 * 2 * 8.3e9
    _, step = costs.train(1, 8192)
    assert 6 * 7.5e9 * 8192 < step < 6 * 8.3e9 * 8192


def test_experts_that_a_batch_reads():
    costs = work.costs_of(NemotronHConfig.from_preset("nemotron-3-nano-30b-a3b"), "bfloat16")
    read = [costs.decode(rows, 0)[0] - 2 * rows * costs.state_bytes - costs.step_bytes for rows in (1, 2, 10_000)]
    assert read[0] == pytest.approx(costs.routed_bytes * 6 / 128)
    assert 1.9 < read[1] / read[0] < 2 and read[2] == pytest.approx(costs.routed_bytes)


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive at one time, those of `known` tensors left out."""

    def __init__(self, known) -> None:
        super().__init__()
        self.known, self.seen, self.now, self.peak = {t.untyped_storage()._cdata for t in known}, {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known | self.seen.keys():
                self.seen[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key) -> None:
        self.now -= self.seen.pop(key, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["M", "*", "-", "M-M*-"])
@pytest.mark.parametrize("rows, tokens, before", [(1, 1100, 0), (3, 512, 0), (1, 512, 700)])
def test_activations_are_those_alive_at_the_peak(pattern, dtype, rows, tokens, before, monkeypatch):
    """As on a GPU, where a part of a prompt attends under a mask in fp32, and in 16 bits by FlashAttention, which makes its
    output alone (an empty one stands for it)."""
    if dtype == "float32":
        monkeypatch.setattr(blocks, "_continues", lambda *_: False)
    monkeypatch.setattr(blocks, "attend_after", lambda query, *_: torch.empty_like(query).transpose(1, 2))
    config = NemotronHConfig(hybrid_override_pattern=pattern, **WIDE)
    model = NemotronHForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.model.tokens_per_pass = {"cpu": 1 << 20}
    ids = random_ids(model, rows, before + tokens)
    cache = empty_cache(models.Side("ours", model, config, None), before + tokens, static=False)
    with torch.no_grad():
        if before:
            model(ids[:, :before], past_key_values=cache, logits_to_keep=1)
        roomy = [layer for layer in cache.layers if isinstance(layer, RoomyGrowingLayer)] if before else []
        held = [memory for layer in roomy for memory in (layer.key_memory, layer.value_memory)]
        with Live([*model.parameters(), ids, *held]) as live:
            model(ids[:, before:], past_key_values=cache, logits_to_keep=1)
    kept = 0 if before else cache.memory_bytes()["total"]
    predicted = work.prefill_activation_bytes(config, rows, tokens, before + tokens, dtype)
    assert predicted == pytest.approx(live.peak - kept, rel=0.1)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 31, 100, 511])
def test_largest_batch(limit):
    tried = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= limit

    assert largest_batch(fits, resolution=0) == limit
    assert len(tried) <= 20 and largest_batch(fits, most=5) == min(limit, 5)
    found = largest_batch(fits, resolution=1 / 8)
    assert found <= limit <= found + max(1, found / 8)


def test_peers_of_the_8b_have_the_published_sizes():
    config = NemotronHConfig.from_preset("nemotron-h-8b")
    with torch.device("meta"):
        llama, qwen2 = (models.PEERS[name][1](models.peer_config(name, config, config)) for name in ("llama", "qwen2"))
    assert llama.num_parameters() == 8_030_261_248 and qwen2.num_parameters() == 7_615_616_512
    half = models.peer_config("llama", models.depth_slice(config, 26), config)
    assert (half.num_hidden_layers, half.hidden_size) == (16, 4096)


@pytest.mark.parametrize("preset", ["nemotron-h-4b", "nano-9b-v2", "nemotron-h-56b"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_other_peers_have_as_many_parameters(preset, name):
    config = NemotronHConfig.from_preset(preset)
    peer = work.costs_of(models.peer_config(name, config, config), "bfloat16").weight_bytes / 2
    assert peer == pytest.approx(cost.num_parameters(config), rel=0.04)


def test_slices_of_the_depth():
    config = NemotronHConfig.from_preset("nemotron-h-8b")
    assert models.depth_slice(config, 4).hybrid_override_pattern == "M-M*"
    assert models.depth_slice(config, 52).hybrid_override_pattern == config.hybrid_override_pattern
    assert models.depth_slice(config, 4).hidden_size == config.hidden_size
    with pytest.raises(ValueError, match="--layers 53: allowed are 1 to the 52 layers"):
        models.depth_slice(config, 53)
    widths = tiny_config("list")
    with pytest.raises(ValueError, match="intermediate_size"):
        models.depth_slice(widths, 2)
