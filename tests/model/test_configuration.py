"""The configuration: every spelling is read, every bad value refused, and what is written is read by all."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import COMMON, EXPERTS, SHAPES, tiny_config, tiny_model
from transformers import AutoConfig
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig as NativeConfig

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.model.configuration_nemotron_h import MOE_FIELDS, preset_names

DENSE = {**COMMON, "hybrid_override_pattern": "M-M*-"}
LAYERS = ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]


# Reading


@pytest.mark.parametrize(
    "spelling",
    [
        {"hybrid_override_pattern": "M-M*-"},
        {"hybrid_override_pattern": "M-M*-", "num_hidden_layers": 5},
        {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp"]},
        {"layers_block_type": LAYERS},
        {"layer_types": LAYERS},
        {"layer_types": ["mamba", "mlp", "mamba", "attention", "mlp"], "num_hidden_layers": 5},
        {"layers_block_type": LAYERS, "hybrid_override_pattern": "M-M*-"},
    ],
)
def test_spellings_of_the_layers(spelling):
    config = NemotronHConfig(**COMMON, **spelling)
    assert config.layers_block_type == config.layer_types == LAYERS
    assert config.num_hidden_layers == 5 and config.hybrid_override_pattern == "M-M*-"


def test_patterns_where_mamba_and_mlp_do_not_alternate():
    config = NemotronHConfig(
        **COMMON, hybrid_override_pattern="MM---M*E-", **{k: v for k, v in EXPERTS.items() if k[0] != "h"}
    )
    assert config.layers_block_type.count("mlp") == 4 and config.mlp_widths == (80,) * 4 and config.has_experts


@pytest.mark.parametrize(
    ("old", "field", "value"),
    [
        ("attention_head_dim", "head_dim", 24),
        ("rms_norm_eps", "layer_norm_epsilon", 1e-6),
        ("norm_eps", "layer_norm_epsilon", 1e-6),
        ("mamba_proj_bias", "use_bias", True),
        ("mamba_n_groups", "n_groups", 4),
        ("mamba_d_conv", "conv_kernel", 3),
        ("mamba_expand", "expand", 3),
        ("mamba_dt_min", "time_step_min", 0.002),
        ("mamba_dt_max", "time_step_max", 0.2),
        ("mamba_dt_limit", "time_step_limit", (0.0, 0.5)),
        ("mamba_dt_init_floor", "time_step_floor", 1e-3),
        ("mamba_conv_bias", "use_conv_bias", False),
        ("mamba_chunk_size", "chunk_size", 32),
    ],
)
def test_synonyms(old, field, value):
    without = {name: v for name, v in DENSE.items() if name != field}
    config = NemotronHConfig(**without, **{old: value})
    assert getattr(config, field) == value
    again = NemotronHConfig(**config.to_dict())
    assert getattr(again, field) == value
    default = getattr(NemotronHConfig(), field)
    assert getattr(NemotronHConfig(**without, **{old: value, field: default}), field) == default != value
    config = NemotronHConfig(**without, **{old: value})
    setattr(config, old, default)
    assert getattr(config, field) == getattr(config, old) == default


# file, what `from_pretrained` is given, field, value
OVERRIDES = [
    ({"rms_norm_eps": 1e-6}, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon", 1e-5),
    ({"layer_norm_epsilon": 1e-6}, {"rms_norm_eps": 1e-5}, "layer_norm_epsilon", 1e-5),
    ({"layer_norm_epsilon": 1e-6, "rms_norm_eps": 1e-6}, {"norm_eps": 1e-5}, "layer_norm_epsilon", 1e-5),
    ({"mamba_chunk_size": 32}, {"chunk_size": 128}, "chunk_size", 128),
    ({"chunk_size": 32}, {"mamba_chunk_size": 128}, "chunk_size", 128),
    ({"attention_head_dim": 64}, {"head_dim": 128}, "head_dim", 128),
    ({"num_experts": 4}, {"n_routed_experts": 8}, "n_routed_experts", 8),
    ({"time_step_limit": [0.0, 0.5]}, {"time_step_limit": None}, "time_step_limit", (0.0, math.inf)),
    ({"time_step_limit": [0.0, 0.5]}, {"mamba_dt_limit": [0.1, "inf"]}, "time_step_limit", (0.1, math.inf)),
    ({"use_mamba_kernels": False}, {"mamba_implementation": "auto"}, "mamba_implementation", "auto"),
    ({}, {"use_mamba_kernels": False}, "mamba_implementation", "torch"),
    ({"num_hidden_layers": 3}, {"layer_types": ["mamba", "mlp"]}, "hybrid_override_pattern", "M-"),
    ({"num_hidden_layers": 3}, {"hybrid_override_pattern": "M*"}, "num_hidden_layers", 2),
    ({"intermediate_size": 8}, {"intermediate_size": [24]}, "mlp_widths", (24,)),
    ({}, {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*-"}, "mtp_hybrid_override_pattern", "*-"),
]


@pytest.mark.parametrize(("stored", "given", "field", "value"), OVERRIDES)
@pytest.mark.parametrize("config_class", [NemotronHConfig, AutoConfig])
def test_an_override_wins_in_any_spelling(config_class, stored, given, field, value, tmp_path):
    fields = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*", **stored}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config, unused = config_class.from_pretrained(
        tmp_path, **given, output_loading_info=True, return_unused_kwargs=True
    )
    assert getattr(config, field) == value and unused == {"output_loading_info": True}


def test_an_override_of_a_model_is_checked_and_used(tmp_path):
    tiny_model("dense").save_pretrained(tmp_path)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path, rms_norm_eps=1e-3)
    assert loaded.model.norm_f.variance_epsilon == loaded.model.layers[0].mixer.norm.variance_epsilon == 1e-3
    with pytest.raises(ValueError, match="layer_norm_epsilon=-1"):
        NemotronHForCausalLM.from_pretrained(tmp_path, rms_norm_eps=-1)


def test_null_in_a_field_does_not_hide_another_spelling():
    assert NemotronHConfig(head_dim=None, attention_head_dim=64).head_dim == 64


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, (0.0, math.inf)),
        ([0.0, math.inf], (0.0, math.inf)),
        ([0.0, None], (0.0, math.inf)),
        ([0.0, "inf"], (0.0, math.inf)),
        ([0.0, "Infinity"], (0.0, math.inf)),
        ([0.0, {"__float__": "Infinity"}], (0.0, math.inf)),
        ([0.001, 0.1], (0.001, 0.1)),
        ((0, 1), (0.0, 1.0)),
    ],
)
def test_time_step_limit(value, expected):
    assert NemotronHConfig(**DENSE, time_step_limit=value).time_step_limit == expected
    assert NemotronHConfig(**DENSE, time_step_min=0.5, time_step_max=0.9).time_step_limit == (0.0, math.inf)
    model = NemotronHForCausalLM(NemotronHConfig(**DENSE, time_step_limit=value))
    assert model.model.layers[0].mixer.time_step_limit == expected


def test_widths_are_never_derived():
    config = NemotronHConfig(**{**DENSE, "expand": 7})
    assert config.mamba_intermediate_size == 64 and config.conv_dim == 64 + 2 * 2 * 16
    model = NemotronHForCausalLM(config)
    assert model.model.layers[0].mixer.in_proj.weight.shape == (64 + 128 + 8, 48)
    assert model.model.layers[3].mixer.q_proj.weight.shape == (64, 48)


def test_use_mamba_kernels_is_a_working_switch():
    assert NemotronHConfig(**DENSE, use_mamba_kernels=False).mamba_implementation == "torch"
    assert NemotronHConfig(**DENSE, use_mamba_kernels=True).mamba_implementation == "auto"
    assert NemotronHConfig(**DENSE).mamba_implementation == "auto"


@pytest.mark.parametrize(
    "spelling", [{"mtp_hybrid_override_pattern": "*E"}, {"mtp_layers_block_type": ["attention", "moe"]}, {}]
)
def test_multi_token_prediction_fields(spelling):
    config = tiny_config("moe", num_nextn_predict_layers=1, **spelling)
    assert config.mtp_layers_block_type == ["full_attention", "moe"]
    assert config.to_dict()["mtp_hybrid_override_pattern"] == "*E"
    assert NemotronHConfig(**config.to_dict()).mtp_layers_block_type == ["full_attention", "moe"]


# Refusing


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hybrid_override_pattern", "M-X"),
        ("hybrid_override_pattern", "M|-"),
        ("hybrid_override_pattern", ""),
        ("hybrid_override_pattern", 5),
        ("layers_block_type", ["mamba", "convolution"]),
        ("layers_block_type", []),
        ("layers_block_type", "M-"),
        ("num_hidden_layers", 7),
        ("hidden_size", 0),
        ("hidden_size", -4),
        ("hidden_size", 2**31),
        ("hidden_size", 4.5),
        ("hidden_size", "48"),
        ("vocab_size", 0),
        ("vocab_size", True),
        ("head_dim", 0),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 0),
        ("mamba_num_heads", 7),
        ("n_groups", 3),
        ("n_groups", 0),
        ("ssm_state_size", None),
        ("chunk_size", 0),
        ("conv_kernel", 1),
        ("conv_kernel", "4"),
        ("intermediate_size", [8, 8, 8]),
        ("intermediate_size", [8]),
        ("intermediate_size", [8, 0]),
        ("intermediate_size", []),
        ("intermediate_size", "80"),
        ("time_step_limit", [0.5, 0.1]),
        ("time_step_limit", [-1.0, 0.1]),
        ("time_step_limit", [0.1]),
        ("time_step_limit", "none"),
        ("time_step_limit", [math.nan, 1.0]),
        ("time_step_limit", ["a", "b"]),
        ("layer_norm_epsilon", 0),
        ("layer_norm_epsilon", math.nan),
        ("layer_norm_epsilon", "small"),
        ("attention_dropout", 1.5),
        ("time_step_min", -1),
        ("mlp_hidden_act", "swoosh"),
        ("mamba_hidden_act", "relu"),
        ("mamba_implementation", "cuda"),
        ("num_nextn_predict_layers", -1),
    ],
)
def test_bad_values(field, value):
    layers = {} if field in ("hybrid_override_pattern", "layers_block_type") else {"hybrid_override_pattern": "M-M*-"}
    with pytest.raises(ValueError) as caught:
        NemotronHConfig(**{**COMMON, **layers, field: value})
    message = str(caught.value)
    assert field in message, message
    assert "allowed" in message or "does not match" in message or "match the expected type" in message, message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_routed_experts", 0),
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", 0),
        ("n_group", 3),
        ("topk_group", 2),
        ("moe_intermediate_size", 0),
        ("moe_latent_size", -1),
        ("moe_shared_expert_intermediate_size", None),
        ("routed_scaling_factor", "big"),
        ("routed_scaling_factor", math.nan),
    ],
)
def test_bad_values_of_experts(field, value):
    with pytest.raises(ValueError, match=field):
        tiny_config("moe", **{field: value})


def test_groups_must_hold_the_experts_that_are_chosen():
    """Two groups of two experts cannot give five: the rest would come from the groups that were ruled out."""
    with pytest.raises(ValueError, match="num_experts_per_tok=5"):
        tiny_config("latent", num_experts_per_tok=5)


def test_contradictions():
    with pytest.raises(ValueError, match="different layers"):
        NemotronHConfig(**COMMON, hybrid_override_pattern="M-M*-", layers_block_type=["mamba"])
    with pytest.raises(ValueError, match="num_hidden_layers=3"):
        NemotronHConfig(**COMMON, hybrid_override_pattern="M-M*-", num_hidden_layers=3)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        NemotronHConfig(**DENSE).num_hidden_layers = 3


def test_a_value_spoilt_later_is_not_written(tmp_path):
    config = NemotronHConfig(**DENSE)
    config.chunk_size = -5
    with pytest.raises(ValueError, match="chunk_size"):
        config.save_pretrained(tmp_path)


# Presets


@pytest.mark.parametrize("name", preset_names())
def test_presets_resolve_and_survive_json(name):
    config = NemotronHConfig.from_preset(name)
    assert NemotronHConfig(**json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()
    assert config.head_dim == 128 and config.n_groups == 8 and config.vocab_size == 131072


@pytest.mark.parametrize(
    ("names", "pattern_counts", "state"),
    [
        (["nemotron-h-8b", "8b", "nvidia/Nemotron-H-8B"], (24, 4, 24, 0), (128, 64, 128)),
        (["nemotron-h-47b", "47b"], (45, 5, 48, 0), (256, 64, 256)),
        (["nemotron-h-56b"], (54, 10, 54, 0), (256, 64, 256)),
        (["nemotron-h-4b"], (24, 4, 24, 0), (112, 64, 128)),
        (["nano-9b-v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"], (27, 4, 25, 0), (128, 80, 128)),
        (["nano-12b-v2"], (28, 6, 28, 0), (128, 80, 128)),
        (["3-nano-4b"], (21, 4, 17, 0), (96, 80, 128)),
        (["3-nano-30b-a3b"], (23, 6, 0, 23), (64, 64, 128)),
        (["3-super"], (40, 8, 0, 40), (128, 64, 128)),
        (["3-ultra"], (48, 12, 0, 48), (256, 64, 128)),
    ],
)
def test_presets_are_the_released_shapes(names, pattern_counts, state):
    for name in names:
        config = NemotronHConfig.from_preset(name)
        assert tuple(config.hybrid_override_pattern.count(letter) for letter in "M*-E") == pattern_counts
        assert (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size) == state


def test_presets_can_be_changed_and_unknown_ones_are_refused():
    assert NemotronHConfig.from_preset("8b", vocab_size=100).vocab_size == 100
    with pytest.raises(ValueError, match="preset='nemotron-h-9000b'.*nemotron-h-8b"):
        NemotronHConfig.from_preset("nemotron-h-9000b")


# Writing


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, tmp_path):
    config = tiny_config(shape, time_step_limit=[0.0, 0.25], mamba_implementation="torch", layer_norm_epsilon=1e-6)
    config.save_pretrained(tmp_path)
    for loaded in (NemotronHConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is NemotronHConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert loaded.time_step_limit == (0.0, 0.25) and loaded.mlp_widths == config.mlp_widths


def test_what_is_written(tmp_path):
    tiny_config("dense").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    written = json.loads(text)
    assert written["model_type"] == "nemotron_h"
    assert written["hybrid_override_pattern"] == "M-M*-M-" and written["num_hidden_layers"] == 7
    assert "time_step_limit" not in written and "Infinity" not in text and "__float__" not in text
    assert not set(MOE_FIELDS) & set(written) and "num_experts_per_tok" in MOE_FIELDS
    assert not {"num_nextn_predict_layers", "layers_block_type", "layer_types", "num_local_experts"} & set(written)
    tiny_config("moe").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["n_routed_experts"] == 8 and written["num_experts_per_tok"] == 3


# Fields of the released dense files that a reader has no default for: mlx-lm 0.32 (its dataclass), llama.cpp, TensorRT-LLM.
REQUIRED = (
    "architectures", "attention_bias", "chunk_size", "conv_kernel", "head_dim", "hidden_size", "hybrid_override_pattern",
    "intermediate_size", "layer_norm_epsilon", "mamba_head_dim", "mamba_num_heads", "mamba_proj_bias", "mlp_bias",
    "mlp_hidden_act", "model_type", "n_groups", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "ssm_state_size", "use_bias", "use_conv_bias", "vocab_size", "max_position_embeddings", "dtype",
)  # fmt: skip


def test_every_field_that_a_reader_requires_is_written(tmp_path):
    tiny_model("dense", use_bias=True, layer_norm_epsilon=1e-4).save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert not set(REQUIRED) - set(written)
    assert written["mamba_proj_bias"] is written["use_bias"] is True
    assert written["rms_norm_eps"] == written["layer_norm_epsilon"] == 1e-4
    assert not set(REQUIRED) - set(json.loads((Path(EMBEDDED_MODEL) / "config.json").read_text()))


@pytest.mark.parametrize(
    ("limit", "written"),
    [((0.0, math.inf), None), ((0.0, 0.25), [0.0, 0.25]), ((0.001, math.inf), [0.001, torch.finfo(torch.float32).max])],
)
def test_what_is_written_is_json(limit, written, tmp_path):
    """RFC 8259 has no Infinity; a step never reaches the largest fp32 number, and therefore replaces it."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    config = tiny_config("dense", time_step_limit=limit, remark=[math.inf, {"nan": math.nan}])
    config.save_pretrained(tmp_path)
    for text in ((tmp_path / "config.json").read_text(), config.to_json_string(use_diff=False)):
        assert json.loads(text, parse_constant=refuse).get("time_step_limit") == written
    back = NemotronHConfig.from_pretrained(tmp_path)
    assert back.time_step_limit == limit and back.remark[0] == math.inf and math.isnan(back.remark[1]["nan"])
    assert list(NativeConfig.from_pretrained(tmp_path).time_step_limit) == (written or [0.0, math.inf])


@pytest.mark.parametrize("shape", ["dense", "moe", "latent", "attention_free"])
def test_transformers_reads_ours_and_we_read_theirs(shape, tmp_path):
    ours = tiny_config(shape, num_nextn_predict_layers=int(shape == "moe"))
    ours.save_pretrained(tmp_path / "ours")
    native = NativeConfig.from_pretrained(tmp_path / "ours")
    assert native.layers_block_type == ours.layers_block_type
    for field in COMMON:
        assert getattr(native, field) == getattr(ours, field)
    native.save_pretrained(tmp_path / "native")
    back = NemotronHConfig.from_pretrained(tmp_path / "native")
    assert back.layers_block_type == ours.layers_block_type and back.time_step_limit == ours.time_step_limit
    assert back.mtp_layers_block_type == ours.mtp_layers_block_type
    assert back.has_experts == ours.has_experts
    if ours.has_experts:
        assert all(getattr(back, field) == getattr(ours, field) for field in MOE_FIELDS)


def test_defaults_are_the_8b():
    assert NemotronHConfig().to_dict() == NemotronHConfig.from_preset("nemotron-h-8b").to_dict()
    with torch.device("meta"):
        model = NemotronHForCausalLM(NemotronHConfig())
    assert sum(weight.numel() for weight in model.parameters()) == 8_100_852_736


def test_number_of_experts_under_the_names_that_libraries_use():
    config = tiny_config("moe")
    assert config.num_experts == config.num_local_experts == config.n_routed_experts == 8
    assert "num_experts" not in config.to_dict()
    assert NemotronHConfig(hybrid_override_pattern="ME", num_experts=4, num_experts_per_tok=2).n_routed_experts == 4
