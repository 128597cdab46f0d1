"""Saving and loading: bit-equal there and back, released names on disk, transformers' own class on the other side."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import NativeForCausalLM, prompt, tiny_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from nemotron_h_hf import NemotronHForCausalLM, NemotronHForSequenceClassification, NemotronHModel

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
VARIANTS = {
    "dense": ("dense", {}),
    "list": ("list", {}),
    "attention_free": ("attention_free", {}),
    "biases": ("dense", {"use_bias": True, "mlp_bias": True, "attention_bias": True}),
    "tied": ("dense", {"tie_word_embeddings": True}),
    "moe": ("moe", {}),
    "latent": ("latent", {}),
    "mtp": ("moe", MTP),
}
# What transformers' own class understands: it ignores attention_bias and tying, and has one width for all MLPs.
SHARED = ["dense", "moe", "latent", "mtp"]


def variant(name: str, **more) -> NemotronHForCausalLM:
    shape, overrides = VARIANTS[name]
    return tiny_model(shape, **overrides, **more)


def mix_dtypes(model: nn.Module) -> nn.Module:
    """bf16 as released, small tensors of Mamba layers and some norms in fp32, in values that bf16 cannot hold."""
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", ".D", "dt_bias", "mixer.norm.weight", "norm_f.weight")):
            parameter.data = torch.rand(parameter.shape) + 1
    return model


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by its name on disk."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "mixed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_bit_equal(name, mixed, tmp_path):
    model = variant(name)
    model = mix_dtypes(model) if mixed else model
    model.save_pretrained(tmp_path / "first")
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "first")
    assert_same_bits(model.state_dict(), loaded.state_dict())
    loaded.save_pretrained(tmp_path / "second")
    assert_same_bits(stored(tmp_path / "first"), stored(tmp_path / "second"))
    texts = [(tmp_path / folder / "config.json").read_text() for folder in ("first", "second")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["dense", "mtp"])
def test_on_the_meta_device_headers_alone_are_read(name, tmp_path, monkeypatch):
    model = mix_dtypes(variant(name))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", None)
    empty = NemotronHForCausalLM.from_pretrained(tmp_path, device_map="meta").state_dict()
    assert all(tensor.is_meta for tensor in empty.values())
    kinds = [{name: (t.dtype, t.shape) for name, t in state.items()} for state in (empty, model.state_dict())]
    assert kinds[0] == kinds[1]


def test_one_norm_in_fp32_leaves_the_other_alone(tmp_path):
    """`norm.weight` of a block and `mixer.norm.weight` of its mixer end alike."""
    model = tiny_model().to(torch.bfloat16)
    for layer in model.model.layers:
        layer.norm.weight.data = torch.rand(layer.norm.weight.shape) + 1
    model.model.layers[2].mixer.D.data = torch.rand(8)
    model.save_pretrained(tmp_path)
    assert_same_bits(model.state_dict(), NemotronHForCausalLM.from_pretrained(tmp_path).state_dict())


def test_a_dtype_that_is_asked_for_wins_but_the_router_bias_stays_fp32(tmp_path):
    mix_dtypes(variant("mtp")).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for name, tensor in model.state_dict().items():
            expected = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            assert tensor.dtype == expected, name


def test_names_on_disk_are_the_released_ones(tmp_path):
    model = variant("mtp", moe_latent_size=32)
    model.save_pretrained(tmp_path)
    expected = {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"}
    mamba = [
        "in_proj.weight",
        "out_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "A_log",
        "D",
        "dt_bias",
        "norm.weight",
    ]
    attention = [f"{letter}_proj.weight" for letter in "qkvo"]
    moe = [f"experts.{e}.{way}_proj.weight" for e in range(8) for way in ("up", "down")]
    moe += ["gate.weight", "gate.e_score_correction_bias", "fc1_latent_proj.weight", "fc2_latent_proj.weight"]
    moe += ["shared_experts.up_proj.weight", "shared_experts.down_proj.weight"]
    mixers = {"M": mamba, "*": attention, "E": moe}
    for prefix, pattern in (("backbone", "MEM*EM"), ("mtp", "*E")):
        for index, letter in enumerate(pattern):
            expected |= {f"{prefix}.layers.{index}.{name}" for name in ("norm.weight",)}
            expected |= {f"{prefix}.layers.{index}.mixer.{name}" for name in mixers[letter]}
    expected |= {f"mtp.layers.0.{name}.weight" for name in ("eh_proj", "enorm", "hnorm")}
    expected |= {"mtp.layers.1.final_layernorm.weight"}
    assert set(stored(tmp_path)) == expected


def test_sharded(tmp_path):
    model = mix_dtypes(variant("mtp"))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "many").values())
    assert_same_bits(stored(tmp_path / "one"), stored(tmp_path / "many"))
    assert_same_bits(model.state_dict(), NemotronHForCausalLM.from_pretrained(tmp_path / "many").state_dict())


NATIVE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 24)[None]
for name in sys.argv[2:]:
    folder = Path(sys.argv[1]) / name
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__ == "transformers.models.nemotron_h.modeling_nemotron_h", type(model)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    save_file({"logits": model(ids, use_cache=False).logits}, folder / "native.logits")
    model.save_pretrained(folder.with_name(name + ".native"))
assert "nemotron_h_hf" not in sys.modules
"""


def test_transformers_own_class_reads_ours_and_we_read_its(tmp_path):
    """Its side runs in a process without the package, where its fixed clamp of the step sizes is set aside."""
    ids, logits = torch.arange(3, 24)[None], {}
    for name in SHARED:
        model = variant(name)
        model.save_pretrained(tmp_path / name)
        logits[name] = model(ids).logits
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", NATIVE, str(tmp_path), *SHARED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    for name in SHARED:
        with safe_open(tmp_path / name / "native.logits", framework="pt") as file:
            torch.testing.assert_close(file.get_tensor("logits"), logits[name], rtol=0, atol=2e-5)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}.native")
        assert type(theirs) is NemotronHForCausalLM
        torch.testing.assert_close(theirs(ids).logits, logits[name], rtol=0, atol=0)
        released = {key: tensor for key, tensor in stored(tmp_path / name).items() if not key.startswith("mtp.")}
        assert_same_bits(released, stored(tmp_path / f"{name}.native"))


@pytest.mark.parametrize("name", SHARED)
def test_both_classes_in_one_process(name, tmp_path):
    """The names that we register are shared with transformers' own class."""
    ours = variant(name)
    ours.save_pretrained(tmp_path / "ours")
    native, info = NativeForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for layer in native.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    torch.testing.assert_close(native(prompt(), use_cache=False).logits, ours(prompt()).logits, rtol=0, atol=2e-5)
    native.save_pretrained(tmp_path / "native")
    released = {key: tensor for key, tensor in stored(tmp_path / "ours").items() if not key.startswith("mtp.")}
    assert_same_bits(released, stored(tmp_path / "native"))


def test_auto_classes_from_a_causal_checkpoint(tmp_path):
    causal = variant("mtp")
    causal.save_pretrained(tmp_path / "causal")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "causal")) is NemotronHForCausalLM

    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert type(base) is NemotronHModel
    hidden = causal.model(prompt()).last_hidden_state
    torch.testing.assert_close(base(prompt()).last_hidden_state, hidden, rtol=0, atol=0)
    base.save_pretrained(tmp_path / "base")
    assert_same_bits(base.state_dict(), AutoModel.from_pretrained(tmp_path / "base").state_dict())

    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=3)
    assert type(classifier) is NemotronHForSequenceClassification
    assert_same_bits(classifier.model.state_dict(), causal.model.state_dict())
    with torch.no_grad():
        expected = hidden[:, -1] @ classifier.score.weight.T
    torch.testing.assert_close(classifier(prompt()).logits, expected, rtol=0, atol=1e-5)
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert_same_bits(classifier.state_dict(), again.state_dict())


def test_base_weights_start_a_classifier_and_a_causal_model_says_what_is_missing(tmp_path):
    base = tiny_model(model_class=NemotronHModel)
    base.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert_same_bits(classifier.model.state_dict(), base.state_dict())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"NemotronHModel"', '"NemotronHForCausalLM"'))
    with pytest.raises(ValueError, match=r"lacks 1 tensors that its config asks for: lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_from_memory():
    model = variant("moe")
    again = NemotronHForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_bits(again.state_dict(), model.state_dict())


def test_fresh_weights_are_drawn_only_for_fresh_models(tmp_path):
    """Loading must never draw A_log, D, dt_bias or out_proj again, not even where `init_weights` runs once more."""
    model = variant("moe")
    model.save_pretrained(tmp_path)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    loaded.init_weights()
    assert_same_bits(model.state_dict(), loaded.state_dict())
    fresh = NemotronHForCausalLM(model.config).state_dict()
    drawn = [name for name in fresh if re.search(r"A_log|\.D$|dt_bias|out_proj", name)]
    assert drawn and not any(torch.equal(fresh[name], model.state_dict()[name]) for name in drawn)


def test_saving_says_what_other_readers_will_not_take(tmp_path, monkeypatch):
    from nemotron_h_hf.model import loading

    said = []
    monkeypatch.setattr(loading.logger, "warning_once", said.append)
    for name, field in (
        ("dense", None),
        ("list", "intermediate_size"),
        ("tied", "tie_word_embeddings"),
        ("biases", "attention_bias"),
    ):
        variant(name).save_pretrained(tmp_path / name)
        assert [field in text for text in said] == ([] if field is None else [True]), name
        said.clear()


@pytest.mark.parametrize("shape", ["dense", "moe", "latent"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_load_state_dict_takes_what_save_pretrained_wrote(tmp_path, shape, max_shard_size):
    """transformers' Trainer resumes this way, file by file, and continues with untrained weights where names do not fit."""
    model, other = tiny_model(shape, seed=1), tiny_model(shape, seed=2)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    left = set(other.state_dict())
    for path in sorted(tmp_path.glob("*.safetensors")):
        result = other.load_state_dict(load_file(path), strict=max_shard_size == "5GB")
        assert not result.unexpected_keys
        left &= set(result.missing_keys)
    assert not left
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_save_of_the_bare_stack_gives_a_fresh_head(tmp_path, caplog):
    model = tiny_model("dense")
    model.model.save_pretrained(tmp_path)
    logging.get_logger("transformers").propagate = True
    try:
        loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    finally:
        logging.get_logger("transformers").propagate = False
    assert "lm_head.weight" in caplog.text and "newly initialized" in caplog.text
    ids = prompt(2, 7)
    assert torch.equal(loaded.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert loaded.lm_head.weight.std() > 0
