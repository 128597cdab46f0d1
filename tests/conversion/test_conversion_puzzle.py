"""A Puzzle model to Megatron and back, with Megatron-Bridge's arguments for experts that differ by layer; the rest is refused."""

import json

import pytest
import torch
from nemotron_h_hf.conversion import convert, read_megatron
from puzzle_tiny import write_released
from safetensors.torch import load_file
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.mark.parametrize("options", [{}, {"format": "torch", "tp": 2, "pp": [3, 3], "ep": 2}])
def test_there_and_back(tmp_path, options):
    folder = write_released(tmp_path / "released")
    convert(folder, tmp_path / "megatron", to="megatron", vocab_divisible_by=8, **options)
    args = read_megatron(tmp_path / "megatron").args
    assert args["per_layer_config_overrides"] == [
        None, {"moe_ffn_hidden_size": 24, "moe_router_topk": 3}, None, {"moe_ffn_hidden_size": 16, "moe_router_topk": 1},
        None, {"moe_ffn_hidden_size": 40, "moe_router_topk": 5},
    ]  # fmt: skip
    assert args["mtp_per_layer_config_overrides"] == [None, {"moe_ffn_hidden_size": 56, "moe_router_topk": 6}]
    assert args["mtp_pattern_length"] == 2 and args["heterogeneous_block_specs"] is True
    convert(tmp_path / "megatron", tmp_path / "back", to="hf")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "nemotron_h_puzzle" and config["architectures"] == ["NemotronHPuzzleForCausalLM"]
    assert [block.get("num_experts_per_tok") for block in config["block_configs"]] == [None, 3, None, 1, None, 5]
    assert [block.get("moe_intermediate_size") for block in config["mtp_block_configs"]] == [None, 56]


@pytest.mark.parametrize(
    ("shape", "more", "message"),
    [
        ("moe", {"n_routed_experts": [8, 4]}, r"n_routed_experts=\[8, 4\]: allowed is one size"),
        ("moe", {"moe_shared_expert_intermediate_size": [40, 16]}, "moe_shared_expert_intermediate_size="),
        ("moe", {"moe_latent_size": [16, None]}, "moe_latent_size="),
        ("dense", {"sliding_window": 8}, "sliding_window=8: allowed is null"),
    ],
)
def test_what_megatron_cannot_say_is_refused_by_name(tmp_path, shape, more, message):
    tiny_model(shape, **more).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "hf", tmp_path / "megatron", to="megatron")
    assert not (tmp_path / "megatron").exists() or not list((tmp_path / "megatron").iterdir())
