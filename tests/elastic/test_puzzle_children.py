"""Children whose experts differ by layer, of ordinary parents and of a Puzzle model: counts, masks, cuts, files."""

import json

import pytest
import torch
from puzzle_tiny import RELEASED, released_shapes, write_released
from safetensors.torch import load_file
from tiny import prompt, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, configuration_utils

from nemotron_h_hf import (
    NemotronHConfig,
    NemotronHElasticForCausalLM,
    NemotronHForCausalLM,
    NemotronHPuzzleConfig,
    cost,
)
from nemotron_h_hf.elastic.budgets import Budget
from nemotron_h_hf.elastic.child import child_of
from nemotron_h_hf.elastic.cut.cutting import slice_checkpoint
from nemotron_h_hf.elastic.masks import attach_masks, child_masks
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.elastic.train.choices import axes_of, budget_of, masks_of, one_hot
from nemotron_h_hf.elastic.train.expected_cost import expected_config
from nemotron_h_hf.scripts import info
from nemotron_h_hf.slicing import cuts, everything, kept_config
from nemotron_h_hf.tensors import checkpoint_tensors

BY_LAYER = Budget(name="by layer", n_routed_experts=(8, 4), num_experts_per_tok=(2, 3), moe_intermediate_size=(8, 24),
                  moe_shared_expert_intermediate_size=(40, 16))  # fmt: skip


def test_the_released_model_has_its_published_parameters():
    config = NemotronHConfig.from_preset("nemotron-3-puzzle-75b-a9b")
    assert isinstance(config, NemotronHPuzzleConfig) and config.num_hidden_layers == 88
    assert round(cost.num_parameters(config, with_mtp=False) / 1e9, 2) == 75.35
    assert round(cost.num_active_parameters(config) / 1e9, 1) == 9.3
    assert len(set(config.moe_intermediate_size)) == 5 and len(set(config.num_experts_per_tok[:40])) == 7
    layers = cost.parameters_by_layer(config)
    assert len(layers) == 90 and sum(layers) == cost.num_parameters(config) - 2 * 131072 * 4096 - 4096


def test_tensors_are_those_of_the_files():
    config = NemotronHConfig.from_dict(RELEASED)
    listed = {place.released: it.shape for it in checkpoint_tensors(config) for place in it.places()}
    assert {name.replace("backbone.", "model."): shape for name, shape in listed.items()} == released_shapes()
    assert {cut.name: cut.shape for cut in cuts(config, everything(config))} == listed
    assert kept_config(config, everything(config)).plain_dict() == config.plain_dict()


def test_info_counts_by_layer(tmp_path, capsys):
    folder = write_released(tmp_path / "released")
    assert info.main([str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    elements = {name: torch.tensor(shape).prod().item() for name, shape in released_shapes().items()}
    assert facts["num_parameters"] == sum(elements.values()) and not facts["problems"]
    by_layer = [
        sum(n for name, n in elements.items() if name.startswith(f"model.layers.{layer}.")) for layer in range(6)
    ]
    assert facts["parameters_by_layer"][:6] == by_layer
    unused = sum((8 - k) * 2 * width * 32 for width, k in ((24, 3), (16, 1), (40, 5)))
    mtp = sum(n for name, n in elements.items() if name.startswith("mtp."))
    assert facts["num_active_parameters"] == facts["num_parameters"] - mtp - unused
    info.main([str(folder)])
    assert "experts by layer" in capsys.readouterr().out


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("shape", ["moe", "latent"])
def test_a_child_by_layer_is_the_masked_parent(shape):
    more = {"n_group": 1, "topk_group": 1} if shape == "latent" else {}
    parent, ids = tiny_model(shape, **more).double(), prompt(2, 9)
    child = child_of(parent.config, BY_LAYER)
    assert isinstance(child.config, NemotronHPuzzleConfig) and child.config.n_routed_experts == [8, 4]
    small = NemotronHForCausalLM(child.config).double().eval()
    released = {name.replace("model.", "backbone.", 1): it for name, it in parent.state_dict().items()}
    pieces = {}
    for cut in child.cuts():
        source, expert = cut.source, None
        if ".experts." in source:
            head, number, rest = source.partition("experts.")[0], *source.partition("experts.")[2].split(".", 1)
            source, expert = f"{head}experts.{rest.removesuffix('.weight')}", int(number)
        pieces[cut.name] = cut.of(released[source] if expert is None else released[source][expert])
    small.load_state_dict(pieces)
    masked = attach_masks(parent)
    masked.masks = child_masks(child)
    assert masked.masks.experts_per_token == {1: 2}
    assert torch.allclose(logits(parent, ids), logits(small, ids), atol=1e-10)
    masked.masks = None
    assert not torch.allclose(logits(parent, ids), logits(small, ids), atol=1e-3)
    masked.masks = child_masks(child)
    masked.masks.experts_per_token[1] = 9
    with pytest.raises(ValueError, match=r"experts_per_token\[1\]=9: allowed is 1 to 3"):
        masked.masks = masked.masks


def test_slices_of_an_ordinary_parent_are_written_as_puzzle(tmp_path):
    tiny_model("moe").save_pretrained(tmp_path / "parent")
    report = slice_checkpoint(tmp_path / "parent", BY_LAYER, tmp_path / "small", verify=True)
    assert report.residual["max_difference_of_logits"] < 1e-4 and "nemotron_h_puzzle" in report.limits[0]
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == "nemotron_h_puzzle" and config["block_configs"][4]["n_routed_experts"] == 4
    assert all(name.startswith(("model.", "lm_head")) for name in load_file(tmp_path / "small" / "model.safetensors"))
    small, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "small"), prompt(1, 9)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "parent", budget=BY_LAYER)
    assert torch.equal(logits(small, ids), logits(loaded, ids))
    assert slice_checkpoint(tmp_path / "parent", BY_LAYER, tmp_path / "small").already_there


def test_budgets_of_a_puzzle_parent(tmp_path):
    folder = write_released(tmp_path / "released")
    config = NemotronHConfig.from_pretrained(folder)
    assert resolve(config, Budget(name="all")).config.moe_intermediate_size == [24, 16, 40, 56]
    budget = Budget(name="less", layers=(0, 1, 2, 4, 5), moe_intermediate_size=(16, 32), num_experts_per_tok=2)
    child = resolve(config, budget)
    assert child.config.moe_intermediate_size == [16, 32] and child.config.num_experts_per_tok == 2
    fewer = resolve(config, Budget(name="fewer", layers=(0, 1, 2, 3, 4))).config
    assert fewer.moe_intermediate_size == [24, 16, 56] and fewer.num_experts_per_tok == [3, 1, 6]
    slice_checkpoint(folder, budget, tmp_path / "small", verify=True)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.mtp.layers[1].mixer.experts.up_proj.shape == (8, 32, 32)
    assert (
        small.model.layers[4].mixer.experts.up_proj.shape == (8, 32, 32) and small.model.layers[4].mixer.gate.top_k == 2
    )
    for fields, message in (
        ({"moe_intermediate_size": (32, 16, 40)}, "moe_intermediate_size=.*at most the parent's 16, 24, 40"),
        ({"num_experts_per_tok": (3, 1)}, "num_experts_per_tok=.*one for each of 3 layers"),
        ({"n_routed_experts": (8, 8, 4)}, "n_routed_experts=.*at least num_experts_per_tok=5"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(config, Budget(name="bad", **fields))


@pytest.mark.parametrize("sizes", ["ordinary", "puzzle"])
def test_live_submodels(sizes, tmp_path):
    """Views of one parent's weights compute what the cut model does."""
    more = {} if sizes == "ordinary" else {"moe_intermediate_size": [16, 40], "n_routed_experts": [8, 6]}
    tiny_model("moe", **more).save_pretrained(tmp_path / "parent")
    parent = NemotronHElasticForCausalLM.from_pretrained(tmp_path / "parent")
    small, ids = parent.submodel(BY_LAYER), prompt(2, 9)
    cut = NemotronHForCausalLM.from_pretrained(tmp_path / "parent", budget=BY_LAYER)
    assert torch.allclose(logits(small, ids), logits(cut, ids), atol=1e-5)
    assert small.config.plain_dict() == cut.config.plain_dict() and parent.submodel(Budget(name="all")) is parent
    small.save_pretrained(tmp_path / "small")
    assert all(name.startswith(("model.", "lm_head")) for name in load_file(tmp_path / "small" / "model.safetensors"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), ids), logits(cut, ids))


def test_a_router_may_choose_expert_sizes_by_layer():
    config = tiny_config("moe")
    axes = axes_of(config, {"moe_intermediate_size": [16], "n_routed_experts": [6]}, ("moe_intermediate_size",))
    budget = budget_of(config, axes, {"moe_intermediate_size": [1, 0], "n_routed_experts": [1]}, "chosen")
    assert budget.moe_intermediate_size == (16, 24) and budget.n_routed_experts == 6
    chosen = one_hot(axes, {"moe_intermediate_size": [1, 0], "n_routed_experts": [1]})
    masks, hard = masks_of(config, axes, chosen), child_masks(child_of(config, budget))
    assert masks.expert_neurons[1].sum() == 16 and torch.equal(masks.expert_neurons[1], hard.expert_neurons[1])
    assert masks.expert_neurons[4].sum() == 24 and torch.equal(masks.experts[4], hard.experts[4])
    expected = expected_config(config, axes, chosen)
    assert int(cost.num_parameters(expected)) == cost.num_parameters(child_of(config, budget).config)


def test_the_ordinary_class_reads_puzzle_files_without_a_warning(tmp_path, monkeypatch):
    folder, said = write_released(tmp_path / "released"), []
    monkeypatch.setattr(configuration_utils.logger, "warning", said.append)
    config = NemotronHConfig.from_pretrained(folder)
    assert type(config) is NemotronHPuzzleConfig and not said
    assert config.to_dict()["block_configs"] == RELEASED["block_configs"]


def test_windows_stay_with_their_layers():
    config = tiny_config("dense", hybrid_override_pattern="M*-*M*", sliding_window=[5, None, 3])
    assert child_of(config, Budget(name="x", layers=(0, 1, 2, 4, 5))).config.sliding_window == [5, 3]
    plain = tiny_config("dense", hybrid_override_pattern="M*-*M*")
    length = 9
    by_hand = sum(sum(min(t + 1, window or length) for t in range(length)) for window in (5, None, 3)) / length
    found, whole = (cost.forward_flops_per_token(it, length)["attention"] for it in (config, plain))
    assert found == pytest.approx(4 * 4 * 16 * by_hand) and whole == 3 * 2 * 4 * 16 * (length + 1)
