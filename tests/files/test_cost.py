"""What a configuration costs, against the published and tabulated numbers of every released model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemotron_h_hf import HybridCache, NemotronHConfig, NemotronHForCausalLM, cost
from nemotron_h_hf.tensors import checkpoint_tensors
from nemotron_h_hf.training.adapters import add_adapters, trained_adapters

MIB = 2**20

# preset: main stack, with MTP, checkpoint tensors, KV bytes per token (bf16), SSM state MiB per sequence (fp32).
# Exact by a model card: 3-nano-4b, 3.5-lightning, 3-super. 3-ultra's stored bytes match exactly, see below.
RELEASED = {
    "nemotron-h-4b": (4_489_223_040, 4_489_223_040, 311, 16384, 84),
    "nemotron-h-8b": (8_100_852_736, 8_100_852_736, 311, 16384, 96),
    "nemotron-h-47b": (46_791_554_816, 46_791_554_816, 577, 20480, 720),
    "nemotron-h-56b": (56_324_350_464, 56_324_350_464, 701, 40960, 864),
    "nano-9b-v2": (8_888_227_328, 8_888_227_328, 341, 16384, 135),
    "nano-12b-v2": (12_310_001_152, 12_310_001_152, 369, 24576, 140),
    "3-nano-4b": (3_973_556_832, 3_973_556_832, 263, 16384, 78.75),
    "3-nano-30b-a3b": (31_577_940_288, 31_577_940_288, 6243, 6144, 46),
    "3.5-lightning": (31_577_940_288, 32_913_266_240, 6513, 6144, 46),
    "3-super": (120_668_707_840, 123_611_033_088, 42683, 8192, 160),
    "3-ultra": (549_308_993_536, 560_524_603_904, 51023, 12288, 384),
}

ACTIVE_BILLIONS = {"3-nano-30b-a3b": 3.58, "3.5-lightning": 3.58, "3-super": 12.77, "3-ultra": 56.06}


@pytest.mark.parametrize("preset", RELEASED)
def test_released_models(preset):
    main, with_mtp, num_tensors, kv_bytes, ssm_mib = RELEASED[preset]
    config = NemotronHConfig.from_preset(preset)
    assert cost.num_parameters(config, with_mtp=False) == main
    assert cost.num_parameters(config) == with_mtp
    assert sum(cost.parameters_by_kind(config).values()) == with_mtp
    assert cost.num_checkpoint_tensors(config) == num_tensors
    assert cost.kv_bytes_per_token(config) == kv_bytes
    assert cost.ssm_state_bytes(config) == ssm_mib * MIB


@pytest.mark.parametrize("preset", RELEASED)
def test_active_parameters(preset):
    config = NemotronHConfig.from_preset(preset)
    active = cost.num_active_parameters(config)
    if preset in ACTIVE_BILLIONS:
        assert round(active / 1e9, 2) == ACTIVE_BILLIONS[preset]
    else:
        assert active == cost.num_parameters(config)


def test_ultra_bytes_are_the_published_ones():
    """Only the router's correction biases are float32: 49 layers of 512 experts cost two more bytes each."""
    assert cost.weight_bytes(NemotronHConfig.from_preset("3-ultra"), "bfloat16") == 1_121_049_257_984


def test_each_mlp_layer_has_its_own_width():
    widths = [48, 16, 80]
    config = small_config(hybrid_override_pattern="M-*-M-", intermediate_size=widths)
    shapes = {tensor.name: tensor.shape for tensor in checkpoint_tensors(config)}
    for layer, width in zip((1, 3, 5), widths, strict=True):
        assert shapes[f"backbone.layers.{layer}.mixer.up_proj.weight"] == (width, 32)
        assert shapes[f"backbone.layers.{layer}.mixer.down_proj.weight"] == (32, width)
    assert cost.parameters_by_kind(config)["mlp"] == 2 * 32 * sum(widths)


def test_biases_and_tied_embeddings():
    plain = small_config(hybrid_override_pattern="M*-")
    changed = small_config(
        hybrid_override_pattern="M*-", use_bias=True, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    )
    kinds, before = cost.parameters_by_kind(changed), cost.parameters_by_kind(plain)
    in_proj_rows = 2 * 64 + 2 * 2 * 8 + 4
    assert kinds["mamba"] - before["mamba"] == in_proj_rows + 32
    assert kinds["attention"] - before["attention"] == 32 + 2 * 16 + 32
    assert kinds["mlp"] - before["mlp"] == 48 + 32
    assert before["lm_head"] == 64 * 32 and kinds["lm_head"] == 0


def test_cache_grows_only_with_attention():
    hybrid = small_config(hybrid_override_pattern="M*-")
    recurrent = small_config(hybrid_override_pattern="MM-")
    assert cost.cache_bytes(hybrid, 100) - cost.cache_bytes(hybrid, 0) == 100 * cost.kv_bytes_per_token(hybrid)
    assert cost.cache_bytes(recurrent, 10_000) == cost.cache_bytes(recurrent, 0)


@pytest.mark.parametrize("pattern", ["M*-", "ME*E"])
def test_counts_are_those_of_a_real_model(pattern):
    """Our list of tensors against what the model allocates; experts are stacked there, apart on disk."""
    config = small_config(
        hybrid_override_pattern=pattern,
        moe_latent_size=8 if "E" in pattern else None,
        num_nextn_predict_layers=2,
        mtp_hybrid_override_pattern="*" + pattern[-2:],
    )
    model = NemotronHForCausalLM(config)
    assert cost.num_parameters(config) == sum(t.numel() for t in model.state_dict().values())


def test_cache_bytes_are_what_the_cache_takes():
    config = small_config(hybrid_override_pattern="M*-M")
    model, cache = NemotronHForCausalLM(config).eval(), HybridCache(config)
    with torch.inference_mode():
        model(torch.arange(23)[None], past_key_values=cache, use_cache=True)
    measured = cache.memory_bytes()
    assert measured["attention"] == 23 * cost.kv_bytes_per_token(config, "float32")
    assert measured["mamba"] == cost.ssm_state_bytes(config) + cost.conv_state_bytes(config, "float32")
    assert measured["total"] == cost.cache_bytes(config, 23, "float32")


@pytest.mark.parametrize("pattern", ["M-M", "*-*", "ME*E"])
def test_flops_are_those_that_torch_counts(pattern):
    """torch counts products of matrices, attention without its mask, and the convolution at its paddings too.

    Its counter listens to every module, which makes the convolution a call of its nn.Conv1d: plain additions go uncounted.
    """
    config = small_config(hybrid_override_pattern=pattern, moe_latent_size=8 if "E" in pattern else None)
    config._attn_implementation = config._experts_implementation = "eager"  # torch counts no grouped products
    model, length = NemotronHForCausalLM(config).eval(), 64
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None] % 60, use_cache=False)
    expected = cost.forward_flops_per_token(config, length)
    unmasked = expected["attention"] * 2 * length / (length + 1)
    padded = length + 2 * (config.conv_kernel - 1)
    counted = length * (expected["linear"] + expected["scan"] + unmasked) + padded * expected["conv"]
    assert counter.get_total_flops() == counted
    assert bool(expected["conv"]) == bool(expected["scan"]) == ("M" in pattern)
    assert cost.training_flops_per_token(config, length) == 3 * sum(expected.values())


def test_backward_takes_twice_the_flops_of_forward():
    config = small_config(hybrid_override_pattern="-*-")
    config._attn_implementation = "eager"
    model, ids = NemotronHForCausalLM(config).train(), torch.arange(32)[None]
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, labels=ids).loss
        forward = counter.get_total_flops()
        loss.backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize(
    ("pattern", "targets", "first"),
    [("-*-", "all", 0), ("-*-", "attention", 1), ("-*-", "lm_head", 3), ("*E", "all", 0), ("-E*-", "mlp", 0)],
)
def test_flops_of_adapters_are_those_that_torch_counts(pattern, targets, first):
    """Frozen weights have no gradient, and below the first adapter nothing goes backward."""
    config, length = small_config(hybrid_override_pattern=pattern), 64
    config._attn_implementation = config._experts_implementation = "eager"
    model = NemotronHForCausalLM(config)
    adapted = add_adapters(model, 4, 8.0, 0.0, targets).train()
    entry = [*model.model.layers, model.lm_head][first]
    entry.register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(), *args[1:]))  # all of its backward
    ids = torch.arange(length)[None] % 60
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=ids, labels=ids).loss.backward()
    elements, lowest = trained_adapters(adapted)
    assert lowest == first
    found = cost.adapter_training_flops_per_token(config, length, elements, lowest)
    forward, above = (cost.forward_flops_per_token(config, length, layer)["attention"] for layer in (0, first))
    masked = (forward + 2 * above) * (1 - 2 * length / (length + 1))  # torch counts attention without its mask
    assert counter.get_total_flops() == pytest.approx(length * (found - masked), rel=1e-12)
    assert found < cost.training_flops_per_token(config, length)


def test_flops_of_the_8b_model():
    """Twice the parameters that multiply, 4 attention layers of 32 x 128 and 24 scans, at 8,192 tokens."""
    config = NemotronHConfig.from_preset("nemotron-h-8b")
    flops = cost.forward_flops_per_token(config, 8192)
    assert flops["linear"] == pytest.approx(2 * (8.1e9 - 131072 * 4096), rel=2e-3)
    assert flops["attention"] == 4 * 2 * 32 * 128 * 8193
    assert 0.005 < flops["scan"] / flops["linear"] < 0.05


def test_bad_values_are_named():
    config = small_config(hybrid_override_pattern="M*-")
    with pytest.raises(ValueError, match=r"int3.*allowed"):
        cost.weight_bytes(config, "int3")
    with pytest.raises(ValueError, match="num_tokens=-1"):
        cost.cache_bytes(config, -1)


def small_config(**fields) -> NemotronHConfig:
    sizes = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    mamba = dict(mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=8, chunk_size=16)
    moe = dict(n_routed_experts=4, moe_intermediate_size=24, moe_shared_expert_intermediate_size=40)
    experts = moe if "E" in fields["hybrid_override_pattern"] else {}
    return NemotronHConfig(**{"intermediate_size": 48, **sizes, **mamba, **experts, **fields})
