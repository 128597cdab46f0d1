"""Training multi-token prediction: alone on a frozen trunk or with it, in every command, saved under the released names."""

import pytest
import torch
from nemotron_h_hf.conversion import convert
from safetensors.torch import load_file
from test_pretrain import write_config
from tiny import tiny_model
from tiny_run import make_arguments, make_rows, read_metrics

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.scripts import pretrain
from nemotron_h_hf.training.distillation import DistillationTrainer
from nemotron_h_hf.training.trainer import NemotronHTrainer

SMALL = {"hybrid_override_pattern": "M*-"}
MTP = {**SMALL, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*-"}


def trained(trainer_class, model, texts, folder, **fields):
    """Two steps; what changed, by the first part of its name."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = make_arguments(folder, max_steps=2, save_strategy="no", gradient_accumulation_steps=1, **fields)
    more = {"teacher": tiny_model("dense", seed=1, **SMALL)} if trainer_class is DistillationTrainer else {}
    trainer_class(model, arguments, train_dataset=make_rows(texts), **more).train()
    after = model.state_dict()
    return {name.partition(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("trainer_class", [NemotronHTrainer, DistillationTrainer])
def test_what_changes(texts, tmp_path, trainer_class):
    changed = trained(trainer_class, tiny_model("dense", **MTP), texts, tmp_path / "off")
    assert changed == {"model", "lm_head"} and "mtp_loss" not in read_metrics(tmp_path / "off")[0]
    changed = trained(trainer_class, tiny_model("dense", **MTP), texts, tmp_path / "both", mtp_loss_weight=0.5)
    assert changed == {"model", "lm_head", "mtp"}
    more = {"mtp_loss_weight": 0.5, "mtp_freeze_trunk": True, "mtp_steps": 2}
    assert trained(trainer_class, tiny_model("dense", **MTP), texts, tmp_path / "alone", **more) == {"mtp"}
    off, both = (read_metrics(tmp_path / name)[0] for name in ("off", "both"))
    assert 0.4 < (both["loss"] - off["loss"]) / both["mtp_loss"] <= 0.5  # fewer tokens than the main loss has


def test_a_run_adds_heads_which_convert_there_and_back(texts, tmp_path):
    """A checkpoint without heads, two depths added: released names, loads, and equals itself after Megatron's format."""
    tiny_model("moe", vocab_size=2048).save_pretrained(tmp_path / "plain")
    flags = {
        "model": str(tmp_path / "plain"), "tokenizer": EMBEDDED_MODEL, "init": "weights", "config_overrides": None,
        "total_tokens": 256, "warmup_tokens": 0, "phases": [{"weights": {"low": 1}}], "save_steps": 9,
        "mtp_depth": 2, "mtp_loss_weight": 0.3, "mtp_freeze_trunk": True,
    }  # fmt: skip
    assert pretrain.main(["--config", str(write_config(tmp_path, texts, **flags))]) == 0
    model = tmp_path / "run" / "model"
    plain, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", model))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in plain.items())
    added = set(saved) - set(plain)
    assert {"mtp.layers.2.eh_proj.weight", "mtp.layers.3.mixer.experts.7.up_proj.weight"} <= added
    assert all(name.startswith("mtp.") for name in added)
    config = NemotronHForCausalLM.from_pretrained(model).config
    assert (config.num_nextn_predict_layers, config.mtp_hybrid_override_pattern) == (2, "*E")
    convert(model, tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(saved) and all(torch.equal(tensor, back[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("flags, message", [
    ({"mtp_loss_weight": -1}, "mtp_loss_weight=-1.0: allowed is 0"),
    ({"mtp_freeze_trunk": True}, "mtp_freeze_trunk=True: allowed is none without mtp_loss_weight"),
    ({"mtp_steps": 2}, "mtp_steps=2: allowed is none without mtp_loss_weight"),
    ({"mtp_steps": 0, "mtp_loss_weight": 0.1}, "mtp_steps=0: allowed is 1 or more"),
    ({"mtp_loss_weight": 0.1}, "mtp_loss_weight=0.1: allowed is 0 for a model without"),
    ({"mtp_depth": 0}, "mtp_depth=0: allowed is 1 or more"),
    ({"mtp_pattern": "*-"}, "mtp_pattern='\\*-': allowed is none without mtp_depth"),
    ({"mtp_depth": 1, "mtp_pattern": "Q"}, "mtp_hybrid_override_pattern='Q'"),
])  # fmt: skip
def test_flags_that_cannot_be(texts, tmp_path, flags, message, capsys):
    with pytest.raises((ValueError, SystemExit), match=message):
        pretrain.main(["--config", str(write_config(tmp_path, texts, **flags))])
