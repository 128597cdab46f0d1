"""A model whose layers are read as they run: the logits of the model in memory, and clear errors for other files."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_config, tiny_model

from nemotron_h_hf.elastic.masks import Masks, attach_masks
from nemotron_h_hf.elastic.prepare.streaming import streamed

MTP = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"]}
CASES = [("dense", {}), ("dense", {"tie_word_embeddings": True, "use_bias": True, "mlp_bias": True}), ("list", {}),
         ("attention_free", {}), ("moe", MTP), ("latent", {})]  # fmt: skip


@pytest.mark.parametrize(("shape", "overrides"), CASES)
@torch.no_grad()
def test_the_same_logits(shape, overrides, tmp_path):
    model = tiny_model(shape, **overrides)
    model.save_pretrained(tmp_path)
    ids = prompt(2, 11)
    found = streamed(model.config, tmp_path)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=0)
    held = [any(not p.is_meta for p in block.mixer.parameters()) for block in found.model.layers]
    assert held == [False] * (len(held) - 1) + [True]  # the last one to run
    if shape not in ("moe", "latent"):  # torch has no grouped product in float64
        wide = streamed(model.config, tmp_path, torch.float64)(ids).logits
        torch.testing.assert_close(wide, model.double()(ids).logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_layer_that_is_left_out_is_not_read(tmp_path):
    model = tiny_model("dense")
    model.save_pretrained(tmp_path)
    found = streamed(model.config, tmp_path)
    read = []
    for index, block in enumerate(found.model.layers):
        block.mixer.register_forward_pre_hook(lambda *_, index=index: read.append(index))
    kept = torch.ones(7)
    kept[[1, 3]] = 0
    attach_masks(found).masks = Masks(layers=kept)
    found(prompt())
    assert read == [0, 2, 4, 5, 6]


def test_a_layer_that_fails_is_let_go_when_the_next_is_read(tmp_path, monkeypatch):
    model = tiny_model("dense")
    model.save_pretrained(tmp_path)
    found = streamed(model.config, tmp_path)
    mixer = found.model.layers[1].mixer
    with monkeypatch.context() as broken:
        broken.setattr(mixer, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            found(prompt())
    found(prompt())
    assert all(p.is_meta for p in mixer.parameters())


def test_other_files_are_refused(tmp_path):
    tiny_model("dense").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"norm.weight in shape \(48,\), its config asks for \(32,\)"):
        streamed(tiny_config("dense", hidden_size=32), tmp_path)
    with pytest.raises(ValueError, match="holds neither model.safetensors nor"):
        streamed(tiny_config("dense"), tmp_path / "nowhere")
    found = streamed(tiny_config("dense", use_bias=True), tmp_path)
    with pytest.raises(ValueError, match="lacks model.layers.0.mixer.in_proj.bias or a part"):
        found(prompt())


def test_an_expert_that_is_missing_is_named(tmp_path):
    model = tiny_model("moe")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["backbone.layers.1.mixer.experts.3.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model.layers.1.mixer.experts.up_proj or a part of it"):
        streamed(model.config, tmp_path)(prompt())
