"""`nemotron-h slice`: ordinary checkpoints out of a parent; interrupted, damaged, full disks; what other readers can express."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_budgets import ELASTIC
from test_child_files import HALF, cut_model, load_file_all, same, write_manifest
from test_slicing import DENSE, EXPERTS, MTP
from tiny import prompt, tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_hf import NemotronHConfig, manifest
from nemotron_h_hf.elastic.budgets import Budget
from nemotron_h_hf.elastic.child_files import PendingCut
from nemotron_h_hf.elastic.cut import cutting
from nemotron_h_hf.elastic.cut.cutting import slice_checkpoint
from nemotron_h_hf.scripts import info
from nemotron_h_hf.scripts import slice as command


class Stopped(Exception):
    """In the place of a crash."""


def write_parent(folder: Path, shape: str = "dense", shard: str = "20KB", **more) -> Path:
    tiny_model(shape, **({"elastic": ELASTIC} if shape == "dense" else {}), **more).save_pretrained(
        folder, max_shard_size=shard
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(json.dumps({"name": name}, indent=2) + "\n")
    (folder / "notes.txt").write_text("mine")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(monkeypatch, count: int, error: Exception) -> None:
    """Let reading fail after `count` tensors."""
    real, seen = PendingCut.read, []

    def read(self):
        seen.append(self)
        if len(seen) > count:
            raise error
        return real(self)

    monkeypatch.setattr(PendingCut, "read", read)


@torch.no_grad()
def native_logits(folder: Path) -> torch.Tensor:
    """transformers' own class, its clamp of the step size off (its own choice, ignoring the checkpoint)."""
    model, loading = NativeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model.eval()(prompt(2, 20)).logits


@pytest.mark.parametrize("shape, sizes, more", [
    ("dense", {**HALF, "intermediate_size": 24, "mamba_head_dim": 4, "num_attention_heads": 2, "layers": (0, 1, 2, 3, 5)}, {}),
    ("dense", {"intermediate_size": (40, 40, 40)}, {}), ("list", {"layers": (0, 1, 2, 3), "hidden_size": 24}, {}),
    ("moe", EXPERTS, {}), ("latent", {**EXPERTS, "n_routed_experts": 8}, {}),
])  # fmt: skip
def test_stock_transformers_gives_the_same_logits(tmp_path, shape, sizes, more):
    source = write_parent(tmp_path / "parent", shape, **more)
    before = contents(source)
    report = slice_checkpoint(source, Budget(name="x", **sizes), tmp_path / "small")
    assert report.limits == [] and report.nearest is None and report.residual["max_difference_of_logits"] < 1e-5
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    same(small, cut_model(shape, sizes, **more))
    with torch.no_grad():
        expected = small(prompt(2, 20)).logits
    torch.testing.assert_close(native_logits(tmp_path / "small"), expected, rtol=0, atol=2e-5)
    assert contents(source) == before


def test_what_lies_in_the_folder(tmp_path):
    source, small = write_parent(tmp_path / "parent"), tmp_path / "small"
    report = slice_checkpoint(source, "half", small)
    names = {path.name for path in small.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert len(shards) > 1 and max((small / name).stat().st_size for name in shards) <= largest
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert names == shards | beside | {"config.json", "elastic_manifest.json", "model.safetensors.index.json"}
    assert all((small / name).read_bytes() == (source / name).read_bytes() for name in beside)
    config = json.loads((small / "config.json").read_text())
    assert "elastic" not in config and config["hidden_size"] == 32
    found = json.loads((small / "elastic_manifest.json").read_text())
    model = cut_model("dense", HALF)
    assert found["num_parameters"] == report.num_parameters == sum(each.numel() for each in model.parameters())
    assert found["budget"] == {"name": "half", **HALF, "trained": True, "loss": 1.95}
    assert found["parent"]["name"] == "parent" and found["parent"]["num_parameters"] == report.parent_parameters
    assert found["residual"]["max_difference_of_logits"] < 1e-5 < found["residual"]["largest_logit"]
    assert set(found["tensors"]) == set(load_file_all(small))
    assert report.bytes_read < report.parent_bytes and str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize("asked, count", [(None, 1), (40_000, 6)])
def test_files_as_in_the_parent_or_as_asked(tmp_path, asked, count):
    source = write_parent(tmp_path / "parent", shard="1GB")
    assert (source / "model.safetensors").is_file()
    report = slice_checkpoint(source, "half", tmp_path / "small", max_shard_bytes=asked)
    assert abs(len(report.files) - count) <= 1 and (report.files == ["model.safetensors"]) == (asked is None)
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), cut_model("dense", HALF))


def test_multi_token_prediction_is_cut_too(tmp_path):
    source = write_parent(tmp_path / "parent", "moe", **MTP)
    slice_checkpoint(source, {**EXPERTS, "layers": [1, 2, 3, 4]}, tmp_path / "small")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), cut_model("moe", EXPERTS, **MTP))


def test_what_other_readers_cannot_express_is_said(tmp_path, capsys):
    source = write_parent(tmp_path / "parent")
    sizes = json.dumps({key: list(size) if isinstance(size, tuple) else size for key, size in DENSE.items()})
    assert command.main([str(source), str(tmp_path / "lists"), "--budget", sizes]) == 0
    said = capsys.readouterr().out
    for field in ("intermediate_size=[8, 40]", "mamba_num_heads=[4, 8, 2]", "mamba_head_dim=[4, 8, 3]"):
        assert f"{field}: without this package" in said
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "lists"), cut_model("dense", DENSE))
    assert command.main([str(source), str(tmp_path / "one"), "--budget", sizes, "--uniform"]) == 0
    assert "without this package" not in capsys.readouterr().out
    one = NemotronHConfig.from_pretrained(tmp_path / "one")
    count = json.loads((tmp_path / "one" / "elastic_manifest.json").read_text())["num_parameters"]
    assert f"{count:,} parameters, {{'hidden_size': 32" in said.split("(--uniform)")[1]
    assert isinstance(one.mamba_num_heads, int) and native_logits(tmp_path / "one").std() > 0.3


def test_the_command_without_comparing(tmp_path, capsys):
    source = write_parent(tmp_path / "parent")
    assert command.main([str(source), str(tmp_path / "out"), "--budget", "half", "--no-verify"]) == 0
    said = capsys.readouterr().out
    assert "budget 'half'" in said and "were not compared" in said and "not trained" not in said
    assert json.loads((tmp_path / "out" / "elastic_manifest.json").read_text())["residual"] is None
    assert command.main([str(source), "--budget", "60%", "--candidates", "3"]) == 0
    assert capsys.readouterr().out.count("parameters") == 3
    for wrong in (["--budget", "half"], [str(tmp_path / "x"), "--budget", "half", "--candidates", "1"],
                  ["--budget", "half", "--candidates", "0"]):  # fmt: skip
        with pytest.raises(ValueError, match="OUT|candidates"):
            command.main([str(source), *wrong])


def test_checksums_of_what_was_written(tmp_path, capsys):
    source, small = write_parent(tmp_path / "parent", shard="1GB"), tmp_path / "small"
    slice_checkpoint(source, "half", small, verify=False)
    assert info.main([str(small), "--checksums"]) == 0
    weights = load_file(small / "model.safetensors")
    weights["lm_head.weight"][48, 16] += 1
    save_file(weights, small / "model.safetensors")
    assert info.main([str(small)]) == 0  # headers and edges alone
    assert info.main([str(small), "--checksums"]) == 1
    assert "another checksum for 1 tensors, lm_head.weight" in capsys.readouterr().err
    assert info.main([str(source), "--checksums"]) == 1
    assert "no elastic_manifest.json to compare with" in capsys.readouterr().err


# Interrupted.


@pytest.mark.parametrize("count", [0, 1, 9, 30, 43])
def test_goes_on_where_it_stopped(tmp_path, monkeypatch, count):
    source, small = write_parent(tmp_path / "parent"), tmp_path / "small"
    before = contents(source)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, count, Stopped())
        slice_checkpoint(source, "half", small)
    assert not {path.name for path in small.iterdir()} & {"config.json", "elastic_manifest.json"}
    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(small)
    whole = {path.name: path.stat().st_mtime_ns for path in small.glob("*.safetensors")}
    report = slice_checkpoint(source, "half", small)
    assert sorted(report.files_kept) == sorted(whole)
    assert all((small / name).stat().st_mtime_ns == stamp for name, stamp in whole.items())
    same(AutoModelForCausalLM.from_pretrained(small), cut_model("dense", HALF))
    assert not list(small.glob("*.part")) and not list(small.glob("*.jsonl")) and contents(source) == before


def test_a_kept_file_that_was_damaged_is_written_again(tmp_path, monkeypatch):
    source, small = write_parent(tmp_path / "parent"), tmp_path / "small"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 40, Stopped())
        slice_checkpoint(source, "half", small)
    first, second, *_ = sorted(small.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    os.truncate(second, 500)
    report = slice_checkpoint(source, "half", small)
    assert first.name not in report.files_kept and second.name not in report.files_kept and report.files_kept
    same(AutoModelForCausalLM.from_pretrained(small), cut_model("dense", HALF))


def test_out_of_disk(tmp_path, monkeypatch):
    """Before it begins, by what is free; in the midst, as the system says it. With room again, it resumes."""
    source, small = write_parent(tmp_path / "parent"), tmp_path / "small"
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="small needs .* GB free"):
        patched.setattr("nemotron_h_hf.resumable.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        slice_checkpoint(source, "half", small)
    assert not small.exists()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        stop_after(patched, 20, OSError(28, "No space left on device"))
        slice_checkpoint(source, "half", small)
    assert not (small / "config.json").exists()
    assert slice_checkpoint(source, "half", small).files_kept


@pytest.mark.slow
def test_killed_at_random_points(tmp_path):
    """`kill -9` at random moments, then let it finish: the same weights as without."""
    source = write_parent(tmp_path / "parent", shard="8KB")
    code = "import sys; from nemotron_h_hf.elastic.cut.cutting import slice_checkpoint; from nemotron_h_hf.elastic import child_files\n"
    code += "import time; real = child_files.PendingCut.read\n"
    code += "child_files.PendingCut.read = lambda self: (time.sleep(0.02), real(self))[1]\n"  # time to kill it
    code += "print('ready', flush=True); slice_checkpoint(sys.argv[1], 'half', sys.argv[2], verify=False)"
    chance, kills = random.Random(0), 0
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", code, str(source), str(tmp_path / "small")], stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:  # fmt: skip
            process.stdout.readline()
            time.sleep(chance.uniform(0.1, 0.6))
            process.kill()
            kills += process.wait() == -9
        if (tmp_path / "small" / "config.json").exists():
            break
    assert kills > 0
    if not (tmp_path / "small" / "config.json").exists():
        slice_checkpoint(source, "half", tmp_path / "small")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), cut_model("dense", HALF))


# Refused.


def test_folders_of_others_are_left_alone(tmp_path, monkeypatch):
    source, small = write_parent(tmp_path / "parent"), tmp_path / "small"
    before = contents(source)
    with pytest.raises(ValueError, match="is the source"):
        slice_checkpoint(source, "half", source)
    assert contents(source) == before
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 20, Stopped())
        slice_checkpoint(source, "half", small)
    for budget, more in (("mixed", {}), ("half", {"max_shard_bytes": 10_000})):
        with pytest.raises(ValueError, match="another slice, unfinished"):
            slice_checkpoint(source, budget, small, **more)
    tiny_model("dense", elastic=ELASTIC, seed=5).save_pretrained(tmp_path / "parent", max_shard_size="20KB")
    with pytest.raises(ValueError, match="another slice, unfinished"):  # the parent is another one by now
        slice_checkpoint(source, "half", small)


def test_a_finished_cut_is_already_there(tmp_path):
    source, small = write_parent(tmp_path / "parent"), tmp_path / "small"
    slice_checkpoint(source, "half", small)
    before = contents(small)
    assert slice_checkpoint(source, "half", small).already_there and contents(small) == before
    with pytest.raises(ValueError, match="is not empty"):
        slice_checkpoint(source, "mixed", small)
    weights = (
        small / "model.safetensors"
        if (small / "model.safetensors").exists()
        else next(small.glob("model-*.safetensors"))
    )
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        slice_checkpoint(source, "half", small)


@pytest.mark.parametrize("budget, message", [
    ("6b", "budget='6b': allowed are 'full', 'half', 'mixed'"), ({"mamba_num_heads": 3}, "a multiple of 2"),
    ({"hidden_size": 64}, "at most the parent's 48"), ("0.01", "the smallest that this parent offers"),
])  # fmt: skip
def test_budgets_that_do_not_fit(tmp_path, budget, message):
    source = write_parent(tmp_path / "parent")
    with pytest.raises(ValueError, match=message):
        slice_checkpoint(source, budget, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_the_smallest_size_that_is_told_is_taken(tmp_path):
    source = write_parent(tmp_path / "parent")
    with pytest.raises(ValueError) as refused:
        slice_checkpoint(source, "1KiB", tmp_path / "small")
    told = re.search(r"allowed is (\S+ \w+) or more", str(refused.value))[1]
    assert slice_checkpoint(source, told, tmp_path / "small").bytes_written


def test_parents_that_are_damaged_or_changed(tmp_path):
    source = write_parent(tmp_path / "parent", shard="1GB")
    write_manifest(source)
    weights = load_file(source / "model.safetensors")

    def refused(message: str, changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, source / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            slice_checkpoint(source, "half", tmp_path / "small")
        assert not (tmp_path / "small" / "config.json").exists()

    refused("another checksum for 44 tensors", {name: tensor * 1.01 for name, tensor in weights.items()})
    refused("lack lm_head.weight", {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"})
    (source / manifest.NAME).unlink()
    refused(
        "NaN or infinity in 1 tensors, backbone.norm_f.weight",
        {**weights, "backbone.norm_f.weight": torch.full((48,), torch.nan)},
    )
    os.truncate(source / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="cut short"):
        slice_checkpoint(source, "half", tmp_path / "other")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        slice_checkpoint(source, "half", tmp_path / "other")


def test_a_wrong_cut_is_noticed(tmp_path, monkeypatch):
    """The residual is a test of the cut: rows of another group make it large, and the folder stays unfinished."""
    source = write_parent(tmp_path / "parent")
    real = PendingCut.read
    monkeypatch.setattr(
        PendingCut, "read", lambda self: real(self).roll(1, 0) if "in_proj" in self.cut.name else real(self)
    )
    with pytest.raises(ValueError, match="from those of the masked parent"):
        slice_checkpoint(source, "half", tmp_path / "small")
    assert not (tmp_path / "small" / "config.json").exists()
    monkeypatch.setattr(cutting, "AUTO_VERIFY_BYTES", 1000)
    # Too large a parent to compare unasked
    assert slice_checkpoint(source, "half", tmp_path / "unseen").residual is None


def test_a_parent_that_is_saved_over_meanwhile(tmp_path, monkeypatch):
    """The places of tensors were read from its old files: the cut would be of two models, or of none."""
    source, other = write_parent(tmp_path / "parent"), write_parent(tmp_path / "other", tie_word_embeddings=False)
    real, seen = PendingCut.read, []

    def read(self):
        seen.append(self)
        if len(seen) == 20:
            for path in sorted(other.glob("*.safetensors")):
                os.replace(path, source / path.name)
        return real(self)

    monkeypatch.setattr(PendingCut, "read", read)
    with pytest.raises(ValueError, match="was changed while it was read"):
        slice_checkpoint(source, "half", tmp_path / "small", verify=False)
    assert not (tmp_path / "small" / "config.json").exists()
