"""Smaller models nested in a vision-language one: loaded and cut, equal to the language model's own child behind the same tower."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from vl_tiny import EXPERTS, IMAGE, TEXT, prompt, released_model, spread, tiles, vl_model, vl_processor, word_tokenizer

from nemotron_h_cli import main
from nemotron_h_hf import (
    BudgetSchedule,
    NemotronHConfig,
    NemotronHElasticForConditionalGeneration,
    NemotronHForCausalLM,
)

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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with its processor, and the parent that `elasticize` makes of it."""
    root = tmp_path_factory.mktemp("parent")
    tokenizer = word_tokenizer()
    processor = vl_processor(tokenizer=tokenizer)
    model = vl_model(image_token_id=processor.image_token_id)
    model.save_pretrained(root / "vl")
    processor.save_pretrained(root / "vl")
    record = json.dumps({"text": "what is this? a cat. user two pictures " * 20})
    (root / "text.jsonl").write_text(f"{record}\n" * 12)
    words = [
        "--calibration",
        str(root / "text.jsonl"),
        "--sequence_length",
        "24",
        "--rows",
        "6",
        "--held_out_rows",
        "2",
    ]
    sizes = "half:hidden_size=32,intermediate_size=40,mamba_num_heads=4,depth=5"
    assert (
        main(["elasticize", str(root / "vl"), str(root / "parent"), *words, "--depth_rows", "2", "--budget", sizes])
        == 0
    )
    return root, model


def inputs_for(model) -> dict:
    batch = prompt([2, "2", 5])
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, model.config.image_token_id),
            "pixel_values": tiles(2)}  # fmt: skip


def test_elasticize_orders_the_language_model_and_leaves_the_function(made):
    root, model = made
    parent = AutoModelForImageTextToText.from_pretrained(root / "parent")
    with torch.no_grad():
        expected = model(**inputs_for(model)).logits
        torch.testing.assert_close(parent(**inputs_for(model)).logits, expected, atol=2e-4, rtol=1e-4)
    stored, before = (load_file(root / name / "model.safetensors") for name in ("parent", "vl"))
    assert not torch.equal(stored["mlp1.3.weight"], before["mlp1.3.weight"])
    assert torch.equal(stored["mlp1.3.weight"].sort(0).values, before["mlp1.3.weight"].sort(0).values)
    for name in before:
        if name.startswith(("vision_model", "mlp1.0", "mlp1.1")):
            assert torch.equal(stored[name], before[name]), name
    budget = parent.config.text_config.elastic["budgets"]["half"]
    assert budget["hidden_size"] == 32 and len(budget["layers"]) == 5
    assert AutoProcessor.from_pretrained(root / "parent").image_token_id == parent.config.image_token_id
    importance = json.loads((root / "parent" / "importance" / "scores.json").read_text())
    assert importance


def test_live_parent(made, tmp_path):
    root, _ = made
    parent = NemotronHElasticForConditionalGeneration.from_pretrained(root / "parent")
    ordinary = AutoModelForImageTextToText.from_pretrained(root / "parent")
    cut = AutoModelForImageTextToText.from_pretrained(root / "parent", budget="half")
    inputs = inputs_for(parent)
    small = parent.submodel("half")
    assert parent.submodel("half") is small
    with torch.no_grad():
        torch.testing.assert_close(parent(**inputs).logits, ordinary(**inputs).logits)
        torch.testing.assert_close(small(**inputs).logits, cut(**inputs).logits)
        given = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(parent.generate(**inputs, **given, budget="half"), cut.generate(**inputs, **given))
        assert torch.equal(parent.generate(**inputs, **given), ordinary.generate(**inputs, **given))
    whole, rows = (m.model.multi_modal_projector.linear_2.weight for m in (parent, small))
    assert rows.shape == (32, 40) and rows.data_ptr() == whole.data_ptr()
    assert small.model.vision_tower is parent.model.vision_tower
    parent.save_pretrained(tmp_path / "again")
    before, again = (load_file(path / "model.safetensors") for path in (root / "parent", tmp_path / "again"))
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)
    fields = [json.loads((path / "config.json").read_text()) for path in (root / "vl", tmp_path / "again")]
    assert fields[0]["architectures"] == fields[1]["architectures"]
    small.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        read = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
        torch.testing.assert_close(read(**inputs).logits, cut(**inputs).logits)
        parent.double()
        assert small.dtype == torch.float64 and small.model.multi_modal_projector.linear_2.weight.dtype == torch.float64
        wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        torch.testing.assert_close(small(**wide).logits.float(), cut(**inputs).logits, atol=1e-4, rtol=1e-4)
    for budget in (["half"], BudgetSchedule("half", "full", at=3)):
        with pytest.raises(ValueError, match="allowed is one budget for all rows"):
            parent.generate(**inputs, budget=budget)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_a_live_parents_copy_has_its_own_submodels(copied):
    text = {"elastic": {"version": 1, "budgets": {"half": BUDGETS["half"]}}}
    live, batch = NemotronHElasticForConditionalGeneration.from_model(vl_model(text=text)), prompt([2, 5, 7])
    expected = live.submodel("half")(**batch).logits
    other = copied(live)
    other.lm_head.weight.mul_(2)
    torch.testing.assert_close(other.submodel("half")(**batch).logits, 2 * expected)
    assert torch.equal(live.submodel("half")(**batch).logits, expected)


def test_what_is_for_text_models_says_so(made, tmp_path, capsys):
    root, _ = made
    assert main(["elasticize", str(root / "vl"), str(tmp_path / "out"), "--stream"]) == 1
    assert "stream=True: allowed is a text model" in capsys.readouterr().err
    words = ["--model", str(root / "parent"), "--data", str(root / "text.jsonl"), "--output_dir", str(tmp_path / "run")]
    for command, more in (("elastic-train", ["--budgets", "{full: 1.0}"]), ("distill", [])):
        assert main([command, *words, *more, "--max_steps", "1", "--use_cpu", "true"]) == 1
        assert "allowed is a text model; nemotron-h sft trains vision-language models" in capsys.readouterr().err


def test_options_of_slice_are_heard_or_refused(made, tmp_path, capsys):
    root, _ = made
    words = ["slice", str(root / "parent"), str(tmp_path / "cut"), "--budget", "half"]
    for option in ("--verify", "--uniform"):
        assert main([*words, option]) == 1
        assert f"{option}: allowed for a parent that is a text model" in capsys.readouterr().err
    assert main([*words, "--max-shard-size", "40KB"]) == 0
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 1
    assert AutoProcessor.from_pretrained(tmp_path / "cut").image_token_id is not None


def test_a_parent_in_the_hub_s_cache_gives_its_processor(made, tmp_path, monkeypatch):
    """By its id, as by its folder."""
    root, _ = made
    monkeypatch.setattr("nemotron_h_hf.elastic.cut.cutting.snapshot_download", lambda name, **_: str(root / "parent"))
    assert main(["slice", "owner/parent", str(tmp_path / "cut"), "--budget", "half"]) == 0
    assert AutoProcessor.from_pretrained(tmp_path / "cut").image_token_id is not None
