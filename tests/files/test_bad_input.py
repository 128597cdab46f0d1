"""Bad input: each is a clear error that names what is wrong, and no half-written folder is left."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB, prompt, tiny_model
from transformers import AutoModelForCausalLM

from nemotron_h_hf import HybridCache, NemotronHConfig, NemotronHForCausalLM

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A checkpoint in one file."""
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def sharded(model, tmp_path) -> Path:
    """A checkpoint in several files."""
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def refused(folder: Path, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(folder)


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# Files


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, OSError)


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -1000])
def test_a_truncated_shard(sharded, kept):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    refused(sharded, rf"{shard.name} is cut short")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 40,
        b"[1, 2]",
        b'{"a": {"data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, "x"]}}',
    ],
    ids=["no text", "no object", "no entry", "no offset"],
)
def test_a_damaged_header(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, r"model\.safetensors is not a safetensors file")


def test_an_index_that_is_no_index(sharded):
    (sharded / INDEX).write_text("{ cut off")
    refused(sharded, "index")


def test_an_index_that_leads_elsewhere(sharded):
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace("model-00001", "../model-00001"))
    refused(sharded, r"names the shard '\.\./model-00001")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", OSError)


@pytest.mark.parametrize("asked", [{}, {"use_safetensors": False}, {"use_safetensors": None}])
def test_pickled_weights_are_never_opened(folder, asked):
    ran = folder / "ran"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin"):
        (folder / name).write_bytes(pickle.dumps({"lm_head.weight": Malicious()}))
    with pytest.raises((OSError, ValueError), match="safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, **asked)
    assert not ran.exists()


# Configuration and weights


def test_a_wrong_shape(folder):
    edit_weights(folder, lambda w: w.update({"backbone.layers.0.mixer.D": torch.zeros(9)}))
    refused(folder, r"layers\.0\.mixer\.D in shape \(9,\), its config asks for \(8,\)")


@pytest.mark.parametrize(
    "pattern, match",
    [
        ("M-M*-M-M", r"lacks 9 tensors that its config asks for: model\.layers\.7\."),
        ("M-M*-", r"has 12 tensors that its config has no place for: .*layers\.5\."),
        ("M-MM-M-", r"lacks 8 tensors .*layers\.3\.mixer\.A_log"),
    ],
    ids=["more layers", "fewer layers", "another kind of layer"],
)
def test_other_layers_than_the_weights(folder, pattern, match):
    edit_config(folder, hybrid_override_pattern=pattern, num_hidden_layers=len(pattern))
    refused(folder, match)


@pytest.mark.parametrize(
    "field, value, match",
    [
        ("intermediate_size", 96, r"layers\.1\.mixer\.down_proj\.weight in shape \(48, 80\), .*\(48, 96\)"),
        ("hidden_size", 64, r"in shape \(.*48.*\), its config asks for \(.*64.*\)"),
        ("vocab_size", 128, r"embeddings\.weight|lm_head\.weight"),
        ("head_dim", 8, r"layers\.3\.mixer\.[kqvo]_proj"),
        ("mamba_num_heads", 16, r"layers\.0\.mixer\.A_log in shape \(8,\), .*\(16,\)"),
    ],
)
def test_other_widths_than_the_weights(folder, field, value, match):
    edit_config(folder, **{field: value})
    refused(folder, match)


def test_other_widths_can_be_asked_for(folder):
    edit_config(folder, vocab_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (128, 48)


@pytest.mark.parametrize("pattern", ["M-X", "M|*", "", 5, "m-", ["M"]])
def test_unknown_layer_letters(folder, pattern):
    edit_config(folder, hybrid_override_pattern=pattern)
    refused(folder, "hybrid_override_pattern")


def test_experts_that_do_not_fit_each_other(tmp_path):
    tiny_model("moe").save_pretrained(tmp_path)
    odd = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    edit_weights(tmp_path, lambda weights: weights.update({odd: torch.zeros(9, 48)}))
    refused(tmp_path, r"experts\.3\.up_proj\.weight in shape \(9, 48\), but .*experts\.0\.up_proj\.weight in \(24")


def test_one_expert_too_few(tmp_path):
    tiny_model("moe").save_pretrained(tmp_path)
    names = [f"backbone.layers.1.mixer.experts.7.{way}_proj.weight" for way in ("up", "down")]
    edit_weights(tmp_path, lambda weights: [weights.pop(name) for name in names])
    refused(tmp_path, r"layers\.1\.mixer\.experts\.(up|down)_proj in shape \(7, .*\(8, ")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_numbers(folder, value):
    edit_weights(folder, lambda w: w["backbone.layers.2.mixer.D"][3:4].fill_(float(value)))
    refused(folder, r"has NaN or infinity in 1 tensors: model\.layers\.2\.mixer\.D")


def test_another_models_config(folder):
    edit_config(folder, model_type="llama")
    with pytest.raises(ValueError, match="model_type='llama': allowed is 'nemotron_h'"):
        NemotronHForCausalLM.from_pretrained(folder)


# Running


@pytest.mark.parametrize("token", [-1, -100, VOCAB, 2**40])
def test_token_ids_out_of_range(model, token):
    ids = prompt(2, 7)
    ids[1, 3] = token
    for run in (model, lambda ids: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=rf"input_ids has {token}: allowed are token ids from 0 to {VOCAB - 1}"):
            run(ids)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (3, 0)])
def test_an_empty_prompt(model, shape):
    ids = torch.empty(shape, dtype=torch.long)
    with pytest.raises(ValueError, match="empty"):
        model(ids)
    with pytest.raises(ValueError, match="empty"):
        model.generate(ids, max_new_tokens=2)


def test_input_of_the_wrong_rank_or_twice(model):
    with pytest.raises(ValueError, match=r"input_ids \(batch, length\) has shape \(4,\)"):
        model(torch.tensor([3, 4, 5, 6]))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(prompt(), inputs_embeds=torch.zeros(1, 20, 48))
    with pytest.raises(ValueError, match="inputs_embeds has width 40: allowed is hidden_size=48"):
        model(inputs_embeds=torch.zeros(1, 20, 40))


def test_a_mask_that_is_too_short(model):
    with pytest.raises(
        ValueError,
        match="attention_mask has 4 columns .* the 9 tokens of the input",
    ):
        model(prompt(1, 9), attention_mask=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("shape", [(1, 20), (3, 20), (2, 30)])
def test_a_mask_of_another_batch_or_length(model, shape):
    with pytest.raises(ValueError, match="attention_mask"):
        model(prompt(2, 20), attention_mask=torch.ones(shape, dtype=torch.long).index_fill(1, torch.tensor([0]), 0))


@pytest.mark.parametrize(
    "other, match",
    [
        ({"hybrid_override_pattern": "M-M*-M"}, "6 layers, the model has 7"),
        (
            {"hybrid_override_pattern": "M-*M-M-"},
            r"layers\[2\] is a GrowingLayer, .* is linear_attention",
        ),
        ({"ssm_state_size": 32}, r"layers\[0\] holds .*: a cache of another model"),
        ({"head_dim": 8}, r"layers\[3\] holds .*: a cache of another model"),
    ],
)
def test_a_cache_of_another_model(model, other, match):
    cache = tiny_model(**other)(prompt()).past_key_values
    with pytest.raises(ValueError, match=match):
        model(prompt(1, 1), past_key_values=cache)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_that_does_not_match_the_cache(model, rows):
    cache = model(prompt(2, 9)).past_key_values
    with pytest.raises(ValueError, match="a cache of another batch"):
        model(prompt(rows, 1), past_key_values=cache)


@pytest.mark.parametrize("cache", [((1, 2),), "dynamic", 7])
def test_a_cache_that_is_none(model, cache):
    with pytest.raises(ValueError, match="cache|past_key_values"):
        model(prompt(), past_key_values=cache)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("length", [2**31, 2**40, 2**63])
def test_lengths_that_overflow(model, length):
    with pytest.raises(ValueError, match="max_length|max_new_tokens"):
        model.generate(prompt(), max_new_tokens=length)
    with pytest.raises(ValueError, match="max_length|max_new_tokens"):
        model.generate(prompt(), max_new_tokens=length, cache_implementation="static")
    with pytest.raises(ValueError, match="max_cache_len"):
        HybridCache(model.config, max_cache_len=length)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "mamba_num_heads", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -4, 2**31, 3.5, "8", None, True])
def test_sizes_that_are_no_counts(field, value):
    with pytest.raises(ValueError, match=field):
        NemotronHConfig(**{field: value})


# Saving


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_save_that_fails_leaves_what_was_there(model, folder, monkeypatch):
    before = listing(folder.parent)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_model(seed=5).save_pretrained(folder)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(folder.parent / "new")
    assert listing(folder.parent) == before and not (folder.parent / "new").exists()


KILLED = """
import os, signal, sys
import transformers.modeling_utils as modeling
from tiny import tiny_model
write, written = modeling.safe_save_file, []
def stop_at_the_third(tensors, filename, *args, **kwargs):
    write(tensors, filename, *args, **kwargs)
    written.append(filename)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
modeling.safe_save_file = stop_at_the_third
for folder in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        written.clear()
        tiny_model(seed=5).save_pretrained(folder, max_shard_size="60KB")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
"""


@pytest.mark.slow
def test_a_killed_save_leaves_no_folder_that_looks_whole(folder):
    before, new = listing(folder), folder.parent / "new"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(folder), str(new)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    kept = {name: content for name, content in listing(folder).items() if not name.startswith(".")}
    assert kept == before and all(name.startswith(".") for name in os.listdir(new))
    for target in (folder, new):
        tiny_model(seed=5).save_pretrained(target)
        assert not any(name.startswith(".") for name in os.listdir(target))


def test_saving_over_a_checkpoint_leaves_no_old_shards(sharded, folder):
    (sharded / "notes.txt").write_text("kept")
    (sharded / "model-of-mine.safetensors").write_text("kept")
    others = {"notes.txt", "model-of-mine.safetensors"}
    newer = tiny_model(seed=5)
    for size in ("100KB", "30KB", "1GB"):
        newer.save_pretrained(sharded, max_shard_size=size)
        index = json.loads((sharded / INDEX).read_text()) if (sharded / INDEX).exists() else None
        expected = {INDEX, *index["weight_map"].values()} if index else {"model.safetensors"}
        found = {name for name in listing(sharded) if name.startswith("model") and name not in others}
        assert found == expected
        loaded = AutoModelForCausalLM.from_pretrained(sharded)
        assert torch.equal(loaded.lm_head.weight, newer.lm_head.weight)
    assert others < set(listing(sharded))


def test_saving_into_a_file(model, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FileExistsError, match="taken is a file"):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
