"""Merging adapters: the same logits from an ordinary checkpoint, in the base's dtypes, and nothing overwritten."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import prompt, tiny_model
from transformers import AutoTokenizer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.scripts import merge
from nemotron_h_hf.training.adapters import add_adapters


@pytest.fixture
def folders(tmp_path):
    def make(shape="dense", dtype=torch.float32, targets="all"):
        base = tiny_model(shape).to(dtype)
        base.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path / "base")
        base = NemotronHForCausalLM.from_pretrained(tmp_path / "base")
        adapted = add_adapters(base, 4, 8.0, 0.0, targets)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path

    return make


@pytest.mark.parametrize("shape, targets", [("dense", "all"), ("moe", "experts"), ("latent", "all")])
def test_logits_are_those_of_the_adapted_model(shape, targets, folders, capsys):
    folder = folders(shape, targets=targets)
    assert merge.main([str(folder / "adapter"), "--output", str(folder / "merged")]) == 0
    adapted = PeftModel.from_pretrained(NemotronHForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    merged = NemotronHForCausalLM.from_pretrained(folder / "merged")
    plain = NemotronHForCausalLM.from_pretrained(folder / "base")
    expected = adapted(prompt()).logits
    torch.testing.assert_close(merged(prompt()).logits, expected, rtol=0, atol=2e-5)
    assert (plain(prompt()).logits - expected).abs().max() > 0.1
    assert set(load_file(folder / "merged" / "model.safetensors")) == set(
        load_file(folder / "base" / "model.safetensors")
    )
    assert "largest difference of logits" in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(folder / "merged")) == 2048


def test_every_weight_keeps_its_dtype_and_is_rounded_once(folders):
    folder = folders(dtype=torch.bfloat16)
    merge.main([str(folder / "adapter"), "--output", str(folder / "merged")])
    base, merged = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
    assert {name: tensor.dtype for name, tensor in merged.items()} == {name: t.dtype for name, t in base.items()}
    lora = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "layers.0.mixer.out_proj"
    a, b = (lora[f"base_model.model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    weight = base[f"backbone.{name}.weight"].float() + 8.0 / 4 * b @ a
    assert torch.equal(merged[f"backbone.{name}.weight"], weight.bfloat16())
    merge.main([str(folder / "adapter"), "--output", str(folder / "wide"), "--dtype", "float32"])
    assert load_file(folder / "wide" / "model.safetensors")[f"backbone.{name}.weight"].dtype == torch.float32


def test_budgets_of_a_parent_no_longer_count_as_trained(folders):
    """The adapters were trained on the whole parent, and every budget's weights are others now."""
    folder = folders()
    base = NemotronHForCausalLM.from_pretrained(folder / "base")
    entry = {"trained": True, "loss": 2.5}
    budgets = {"full": entry, "small": {"hidden_size": 32, **entry}}
    base.config.elastic = {"version": 1, "budgets": budgets, "choices": {"hidden_size": [48, 32]}}
    base.save_pretrained(folder / "base")
    merge.main([str(folder / "adapter"), "--output", str(folder / "merged")])
    for name, kept in (("base", True), ("merged", False)):
        elastic = read_elastic(NemotronHForCausalLM.from_pretrained(folder / name).config)
        assert [(one.trained, one.loss is not None) for one in elastic.budgets.values()] == [(kept, kept)] * 2, name


@pytest.mark.slow
def test_merged_checkpoint_needs_neither_peft_nor_this_package(folders):
    folder = folders()
    merge.main([str(folder / "adapter"), "--output", str(folder / "merged")])
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(folder / 'merged')!r}).eval()\n"
        "assert 'nemotron_h_hf' not in sys.modules and 'peft' not in sys.modules\n"
        f"assert type(m).__module__ == {NativeForCausalLM.__module__!r}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_what_is_there_is_not_overwritten(folders):
    folder = folders()
    with pytest.raises(ValueError, match="is the source"):
        merge.main([str(folder / "adapter"), "--output", str(folder / "base")])
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty"):
        merge.main([str(folder / "adapter"), "--output", str(folder / "taken")])
    with pytest.raises(ValueError, match="adapter_config.json"):
        merge.main([str(folder / "base"), "--output", str(folder / "merged")])
    assert not (folder / "merged").exists()
