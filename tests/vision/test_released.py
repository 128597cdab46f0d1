"""Checkpoints in the released layouts: names and fields as they were, logits as transformers' own omni computes them."""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeLanguageModel
from vl_tiny import IMAGE, TEXT, omni_fields, released_model, spread, tiles, vl_model

import nemotron_h_hf

RADIO_NAMES = {
    "vision_model.radio_model.model.patch_generator.cls_token.token",
    "vision_model.radio_model.model.patch_generator.pos_embed",
    "vision_model.radio_model.model.patch_generator.embedder.weight",
    "vision_model.radio_model.input_conditioner.norm_mean",
    "vision_model.radio_model.input_conditioner.norm_std",
    *(
        f"vision_model.radio_model.model.blocks.{layer}.{module}.{kind}"
        for layer in (0, 1)
        for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
}
PROJECTOR = {"mlp1.0.weight", "mlp1.1.weight", "mlp1.3.weight"}
INTERNVIT_NAMES = {
    *(f"vision_model.embeddings.{name}" for name in ("class_embedding", "position_embedding")),
    *(f"vision_model.embeddings.patch_embedding.{kind}" for kind in ("weight", "bias")),
    *(f"vision_model.encoder.layers.{layer}.{name}" for layer in (0, 1) for name in ("ls1", "ls2")),
    *(
        f"vision_model.encoder.layers.{layer}.{module}.{kind}"
        for layer in (0, 1)
        for module in ("attn.qkv", "attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
}


def native_omni(fields: dict):
    """transformers' omni with its own language model, whose step size starts at 0 as everywhere else."""
    omni = pytest.importorskip("transformers.models.nemotron_h_omni.modeling_nemotron_h_omni")
    configs = pytest.importorskip("transformers.models.nemotron_h_omni.configuration_nemotron_h_omni")
    config = configs.NemotronH_Omni_Reasoning_V3_Config(**fields)
    native = omni.NemotronH_Omni_Reasoning_V3(config)
    text = NativeLanguageModel.config_class(**{**fields["text_config"], "use_mamba_kernels": False})
    native.language_model = NativeLanguageModel(text)
    for block in native.language_model.model.layers:
        if block.block_type == "linear_attention":
            block.mixer.time_step_limit = (0.0, float("inf"))
    return native.eval()


def names_in(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture
def omni(tmp_path):
    """A tiny omni checkpoint as transformers writes it, config.json with the released names, and its own model."""
    native = native_omni(omni_fields())
    spread(native)
    native.save_pretrained(tmp_path / "omni")
    path = tmp_path / "omni" / "config.json"
    fields = json.loads(path.read_text())
    for name, released in (("text_config", "llm_config"), ("image_token_id", "img_context_token_id")):
        fields[released] = fields.pop(name)
    fields |= {"model_type": "NemotronH_Nano_Omni_Reasoning_V3", "architectures": ["NemotronH_Nano_Omni_Reasoning_V3"]}
    path.write_text(json.dumps(fields))
    return native, tmp_path / "omni"


def test_omni_gives_the_logits_of_transformers_own_class(omni):
    native, folder = omni
    ours = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(ours) is nemotron_h_hf.NemotronH_Nano_Omni_Reasoning_V3
    grids = torch.tensor([[4, 6], [2, 4]])
    pixels = torch.randn(32, 3 * 64, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[0, 3:9] = ids[1, 10:12] = IMAGE
    with torch.no_grad():
        expected = native(ids, pixel_values=pixels, image_grid_hw=grids).logits
        found = ours(ids, pixel_values=pixels, image_grid_hw=grids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_omni_is_written_back_as_it_was(omni, tmp_path):
    _, folder = omni
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    # transformers' class lacks the conditioner, which released files have, and has scales of one, which they do not
    assert all("radio_model.input_conditioner.norm_" in name for name in set(after) - set(before))
    assert all(name.endswith("lambda1") and bool((before[name] == 1).all()) for name in set(before) - set(after))
    assert all(torch.equal(before[name], after[name]) for name in set(before) & set(after))
    first, second = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert second["model_type"] == first["model_type"] and second["architectures"] == first["architectures"]
    assert "llm_config" in second and "text_config" not in second and second["img_context_token_id"] == IMAGE


def test_nano_vl_has_the_released_names_and_fields(tmp_path):
    model = released_model("nano")
    model.save_pretrained(tmp_path)
    names = names_in(tmp_path)
    radio = {name for name in names if name.startswith("vision_model.")}
    assert radio - {"vision_model.radio_model.summary_idxs"} == RADIO_NAMES
    assert {name for name in names if name.startswith("mlp1.")} == PROJECTOR
    rest = names - radio - PROJECTOR
    assert all(name.startswith(("language_model.backbone.", "language_model.lm_head.")) for name in rest)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "NemotronH_Nano_VL_V2" and fields["architectures"] == ["NemotronH_Nano_VL_V2"]
    for name in (
        "llm_config",
        "force_image_size",
        "img_context_token_id",
        "norm_mean",
        "vit_hidden_size",
        "ps_version",
    ):
        assert name in fields, name
    assert fields["vision_config"]["args"] == {"model": "vit_huge_patch16_224"}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ids = torch.randint(3, 50, (1, 12))
    ids[0, 4:8] = IMAGE
    pixels = tiles(1, side=32)
    torch.testing.assert_close(again(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


def test_a_file_without_summary_indices_and_conditioner_loads(tmp_path):
    released_model("nano").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "summary" not in name and "conditioner" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_shapes_of_radio_are_those_of_its_timm_name():
    fields = {
        "version": "radio_v2.5-h",
        "args": {"model": "vit_huge_patch16_224", "cpe_max_size": 1024},
        "patch_size": 16,
    }
    config = AutoConfig.for_model("NemotronH_Nano_VL_V2", llm_config=TEXT, vision_config=fields)
    tower = config.vision_config
    shape = (tower.hidden_size, tower.num_hidden_layers, tower.num_attention_heads, tower.max_img_size)
    assert shape == (1280, 32, 16, 1024) and config.image_seq_length == 256


def test_audio_is_left_out_with_one_message_that_names_it(omni, tmp_path, caplog, monkeypatch):
    _, folder = omni
    weights = load_file(folder / "model.safetensors")
    weights |= {f"sound_encoder.encoder.layers.{i}.weight": torch.ones(2, 2) for i in (0, 1)}
    weights["sound_projection.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "sound_config": {"hidden_size": 3}}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("nemotron_h_hf"), "propagate", True)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    told = [record.message for record in caplog.records if "audio" in record.message]
    assert len(told) == 1 and "3 audio tensors" in told[0] and "sound_encoder.encoder.layers.0.weight" in told[0]
    model.save_pretrained(tmp_path / "again")
    assert "sound_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_multi_token_prediction_is_kept(tmp_path):
    fields = omni_fields(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    model = released_model("omni", **fields)
    model.save_pretrained(tmp_path / "first")
    names = names_in(tmp_path / "first")
    assert any(name.startswith("mtp.") and ".experts.7." in name for name in names)
    assert "vision_projector.vision_final_layernorm.weight" in names
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "first")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_internvit_has_its_released_names(tmp_path):
    model = vl_model()
    model.save_pretrained(tmp_path)
    names = names_in(tmp_path)
    assert {name for name in names if name.startswith("vision_model.")} == INTERNVIT_NAMES
    weights = load_file(tmp_path / "model.safetensors")
    attention = model.model.vision_tower.encoder.layer[0].attention
    stacked = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(weights["vision_model.encoder.layers.0.attn.qkv.weight"], stacked)


@pytest.mark.parametrize("kind", ["nvlm", "nano", "omni"])
def test_trainer_resumes_from_names_on_disk(kind, tmp_path):
    model = vl_model() if kind == "nvlm" else released_model(kind)
    model.save_pretrained(tmp_path)
    other = vl_model(seed=1) if kind == "nvlm" else released_model(kind, seed=1)
    loaded = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys and all("layer_scale" in name for name in loaded.missing_keys)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize("what", ["file", "header", "tensor"])
def test_a_file_cut_short_is_refused(what, tmp_path):
    vl_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    if what == "tensor":
        save_file({name: t for name, t in load_file(path).items() if name != "mlp1.1.weight"}, path, {"format": "pt"})
    else:
        path.write_bytes(data[: len(data) // 2] if what == "file" else data[:100])
    with pytest.raises(ValueError, match="linear_1" if what == "tensor" else "model.safetensors"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
