"""Smaller models nested in a vision-language one: loaded and cut, equal to the language model's own child behind the same tower."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from vl_tiny import EXPERTS, TEXT, prompt, released_model, spread, tiles, vl_model

from nemotron_h_cli import main
from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM

BUDGETS = {
    "half": {"hidden_size": 32, "intermediate_size": 40, "mamba_num_heads": 4, "layers": [0, 1, 2, 3, 4, 5]},
    "experts": {"hidden_size": 32, "n_routed_experts": 4, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_child_sees_what_its_language_model_would(kind, tmp_path):
    """The text parent's own child, fed by hand with the parent's tower and the first rows of the projector's last matrix."""
    name = "half" if kind == "dense" else "experts"
    text = {**(EXPERTS if kind == "experts" else {}), "elastic": {"version": 1, "budgets": {name: BUDGETS[name]}}}
    parent = vl_model(text=text)
    parent.save_pretrained(tmp_path / "vl")
    alone = spread(NemotronHForCausalLM(NemotronHConfig(**{**TEXT, **text})))
    state = {name.replace("model.language_model.", "model."): weight for name, weight in parent.state_dict().items()}
    alone.load_state_dict({name: weight for name, weight in state.items() if name in alone.state_dict()})
    alone.save_pretrained(tmp_path / "text")
    child, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "vl", budget=name, output_loading_info=True)
    assert child.config.text_config.hidden_size == 32 and info["bytes_read"] < info["parent_bytes"]
    small = NemotronHForCausalLM.from_pretrained(tmp_path / "text", budget=name)
    batch, pixels = prompt([2, "2", 5]), tiles(2)
    with torch.no_grad():
        images = torch.cat(parent.get_image_features(pixels).pooler_output)[:, :32]
        embeds = small.get_input_embeddings()(batch["input_ids"])
        embeds[0, 2:10] = images
        torch.testing.assert_close(child(**batch, pixel_values=pixels).logits, small(inputs_embeds=embeds).logits)
    assert main(["slice", str(tmp_path / "vl"), str(tmp_path / "cut"), "--budget", name]) == 0
    cut = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")
    for key, weight in child.state_dict().items():
        assert torch.equal(weight, cut.state_dict()[key]), key
    assert load_file(tmp_path / "cut" / "model.safetensors")["mlp1.3.weight"].shape == (32, 40)


def test_a_released_model_with_radio(tmp_path):
    model = released_model("nano")
    model.config.text_config.elastic = {"version": 1, "budgets": {"half": BUDGETS["half"]}}
    model.save_pretrained(tmp_path)
    child = AutoModelForImageTextToText.from_pretrained(tmp_path, budget="half")
    assert type(child) is type(model) and child.model.multi_modal_projector.linear_2.weight.shape == (32, 40)
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, child.model.vision_tower.state_dict()[name]), name


def test_a_budget_that_is_not_there(tmp_path, capsys):
    vl_model(text={"elastic": {"version": 1, "budgets": {"half": BUDGETS["half"]}}}).save_pretrained(tmp_path / "vl")
    assert main(["slice", str(tmp_path / "vl"), str(tmp_path / "cut"), "--budget", "third"]) == 1
    assert "third" in capsys.readouterr().err and not (tmp_path / "cut" / "config.json").exists()
