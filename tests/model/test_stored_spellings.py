"""Checkpoints as other programs stored them: the embedding's older name, and any mix of dtypes, against transformers' own class."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import native_twin, prompt, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM, NemotronHModel
from nemotron_h_hf.checkpoint_summary import disagreements, load_target
from nemotron_h_hf.model import weights
from nemotron_h_hf.tokenizer_files import TOKENIZER_FILES, copy_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PLACES = ("embeddings", "lm_head", "in_proj", "out_proj", "conv1d", r"A_log|\.D$|dt_bias", "norm", "[qkv]_proj",
          "(up|down)_proj", r"layers\.[0-2]\.")  # fmt: skip


def rewrite(folder, change):
    """Each tensor of a folder as `change(name, tensor)` says: (name, tensor)."""
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(change(*item) for item in tensors.items()), folder / "model.safetensors", metadata={"format": "pt"})


def singular(name, tensor):
    return name.replace("embeddings", "embedding"), tensor


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_the_embedding_in_the_singular(shape, prefix, tmp_path):
    """transformers 5.3 to 5.15 wrote it; what we write again has the released name."""
    model, ids = tiny_model(shape), prompt(2, 9)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda name, tensor: (singular(name, tensor)[0].replace("backbone.", prefix), tensor))
    assert f"{prefix}embedding.weight" in load_file(tmp_path / "model.safetensors")
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    config, contents = load_target(tmp_path)
    assert disagreements(config, contents) == []
    assert "backbone.embeddings.weight" in weights.find_tensors([tmp_path / "model.safetensors"])
    fresh = tiny_model(shape, seed=3)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert "backbone.embeddings.weight" in load_file(tmp_path / "again/model.safetensors")


@pytest.mark.parametrize("shape", ["dense", "latent"])
def test_names_of_transformers_modules_are_saved_as_released(shape, tmp_path):
    """A bare state dict (`model.`, all experts in one tensor) loads, and is saved in released names, one matrix per expert."""
    model, ids = tiny_model(shape), prompt(2, 9)
    model.save_pretrained(tmp_path)
    released = set(load_file(tmp_path / "model.safetensors"))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again/model.safetensors")) == released


def test_the_embedding_in_the_singular_without_a_head(tmp_path):
    model, ids = tiny_model("dense", model_class=NemotronHModel), prompt(2, 9)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, singular)
    loaded = NemotronHModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("most", "other"), [("BF16", "F32"), ("F32", "BF16"), ("F32", "F64"), ("F64", "F32"), ("BF16", "F16")]
)
def test_any_mix_of_stored_dtypes_runs_as_in_the_native_class(most, other, tmp_path):
    model, ids = tiny_model("dense"), prompt(2, 12)
    for place in PLACES:
        model.save_pretrained(tmp_path)
        rewrite(tmp_path, lambda n, t, place=place: (n, t.to(DTYPES[other if re.search(place, n) else most])))
        config = json.loads((tmp_path / "config.json").read_text())
        config["dtype"] = str(DTYPES[most]).removeprefix("torch.")
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded, native = NemotronHForCausalLM.from_pretrained(tmp_path), NativeForCausalLM.from_pretrained(tmp_path)
        for layer in native.model.layers:
            if layer.block_type == "linear_attention":
                layer.mixer.time_step_limit = (0.0, float("inf"))
        with torch.no_grad():
            ours, theirs = loaded(ids).logits, native(ids).logits
        assert ours.dtype == loaded.dtype == native.dtype == DTYPES[most], place
        assert (ours.double() - theirs.double()).abs().max() < (0.3 if most == "BF16" else 1e-4), place
        assert loaded.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == 14
        loaded.train()(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("shape", ["dense", "moe", "latent"])
def test_float64(shape, tmp_path):
    """Experts included: PyTorch's grouped products, the default, have no float64."""
    model, ids = tiny_model(shape), prompt(2, 12)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda name, tensor: (name, tensor.double()))
    native = native_twin(model).double()
    native.set_experts_implementation("eager")
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (loaded(ids).logits - native(ids).logits).abs().max() < 1e-5  # the native scan is fp32
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float64}
    loaded.train()(ids, labels=ids).loss.backward()


def test_what_is_computed_in_fp32_keeps_its_stored_dtype(tmp_path):
    model = tiny_model("moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    wide = re.compile(r"A_log|\.D$|dt_bias|norm|gate")
    rewrite(tmp_path, lambda n, t: (n, t.float() if wide.search(n) else t))
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    for name, weight in loaded.named_parameters():
        assert weight.dtype == (torch.float32 if wide.search(name) else torch.bfloat16), name


def test_copied_tokenizers_have_the_plain_class(tmp_path):
    """`TokenizersBackend`, which transformers 5 writes, stops every older reader, llama.cpp's converter among them."""
    source, target = tmp_path / "source", tmp_path / "target"
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(source)
    assert json.loads((source / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    target.mkdir()
    assert "tokenizer_config.json" in copy_files(TOKENIZER_FILES, source, target)
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and written["padding_side"] == "left"


def test_the_tokenizer_in_the_box_pads_on_the_left():
    """Prompts of unequal length in one batch continue as each does alone."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(EMBEDDED_MODEL),
        AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL),
    )
    texts, model = ["import os", "class A", "def read_lines(path):"], model.float()
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for text, row in zip(texts, together, strict=True):
        one = tokenizer(text, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=8, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert torch.equal(row[: len(alone)], alone)
