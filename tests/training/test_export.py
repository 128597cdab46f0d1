"""`nemotron-h export`: checkpoints whose tensors are in parts become ordinary ones, one tensor at a time."""

import json
import shutil
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from nemotron_h_hf.conversion import sharded_run
from nemotron_h_hf.conversion.source_checkpoint import SourceCheckpoint
from peft import get_peft_model_state_dict
from tiny import prompt, tiny_model
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.scripts import export
from nemotron_h_hf.training.adapters import add_adapters
from nemotron_h_hf.training.checkpoints import mark_whole


def write_sharded(folder, model, weights=None):
    """As Accelerate writes it, from one process."""
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    dcp.save({"model": weights or model.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    return mark_checkpoint(folder)


def mark_checkpoint(folder):
    (folder / "UNFINISHED").touch()
    mark_whole(folder, {"step": 3, "tokens_per_step": 1})
    return folder


@pytest.mark.parametrize("shape", ["dense", "moe", "latent"])
def test_sharded_weights_become_an_ordinary_checkpoint(shape, tmp_path, capsys):
    model, ids = tiny_model(shape), prompt()
    write_sharded(tmp_path / "run" / "checkpoint-3", model)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert "tensors of" in capsys.readouterr().out
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("x")["input_ids"]


def test_dtype_and_shards(tmp_path):
    model = tiny_model("moe")
    checkpoint = write_sharded(tmp_path / "checkpoint-3", model)
    target = tmp_path / "model"
    assert export.main([str(checkpoint), str(target), "--dtype", "bfloat16", "--max-shard-gb", "2e-5"]) == 0
    assert len(list(target.glob("model-*.safetensors"))) > 3
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in NemotronHForCausalLM.from_pretrained(target).state_dict().items():
        kept = name.endswith("e_score_correction_bias")
        assert value.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(value, model.state_dict()[name].to(value.dtype))


def test_one_tensor_in_memory_at_a_time(tmp_path, monkeypatch):
    checkpoint = write_sharded(tmp_path / "checkpoint-3", tiny_model("moe"))
    alive, most = weakref.WeakSet(), 0
    read = SourceCheckpoint.__getitem__

    def counted(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(SourceCheckpoint, "__getitem__", counted)
    count = sharded_run.export_run(checkpoint, tmp_path / "model")
    assert count > 50 and most <= 2


def test_ordinary_checkpoints_are_copied(tmp_path):
    model = tiny_model("moe")
    model.save_pretrained(tmp_path / "checkpoint-3")
    mark_checkpoint(tmp_path / "checkpoint-3")
    assert export.main([str(tmp_path / "checkpoint-3"), str(tmp_path / "model")]) == 0
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("sharded", [True, False])
def test_adapters_alone_are_refused(sharded, tmp_path):
    adapted, checkpoint, target = (
        add_adapters(tiny_model(), 2, 4.0, 0.0, "all"),
        tmp_path / "checkpoint-3",
        tmp_path / "m",
    )
    if sharded:  # as Accelerate does with adapter_only
        write_sharded(checkpoint, adapted, get_peft_model_state_dict(adapted))
    else:
        adapted.save_pretrained(checkpoint)
        adapted.config.save_pretrained(checkpoint)
        mark_checkpoint(checkpoint)
    way_on = f"remove {checkpoint} and repeat" if sharded else f"merge {checkpoint} --output {target}"
    with pytest.raises(ValueError, match=rf"holds .*adapters .*allowed is a checkpoint of a whole model; .*{way_on}"):
        export.main([str(checkpoint), str(target)])
    assert not target.exists()


def test_names_under_wrappers():
    wrapped = "model.model.layers.3._checkpoint_wrapped_module.mixer.in_proj.weight"
    assert sharded_run.plain_name(wrapped).released == "backbone.layers.3.mixer.in_proj.weight"
    assert sharded_run.plain_name("model._orig_mod.model.norm_f.weight").released == "backbone.norm_f.weight"
    assert sharded_run.plain_name("model.lm_head.weight").released == "lm_head.weight"


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match="SRC=.*: allowed is a run's folder with a whole checkpoint"):
        export.main([str(tmp_path), str(tmp_path / "model")])
    checkpoint = write_sharded(tmp_path / "run" / "checkpoint-3", tiny_model())
    with pytest.raises(ValueError, match="--max-shard-gb=0.0: allowed is"):
        export.main([str(checkpoint), str(tmp_path / "model"), "--max-shard-gb", "0"])
    [part] = (checkpoint / "pytorch_model_fsdp_0").glob("*.distcp")
    shutil.copy(part, tmp_path / "part")
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"distcp has \d+ bytes, it was written with"):
        export.main([str(tmp_path / "run"), str(tmp_path / "model")])
    part.unlink()
    with pytest.raises(ValueError, match="distcp is missing"):
        sharded_run.export_run(checkpoint, tmp_path / "model")
    shutil.copy(tmp_path / "part", part)
    assert sharded_run.export_run(checkpoint, tmp_path / "model") > 20
    with pytest.raises(ValueError, match="holds safetensors files already"):
        sharded_run.export_run(checkpoint, tmp_path / "model")
