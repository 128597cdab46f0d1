"""`from_pretrained(parent, budget=...)`: the small model alone, read out of the parent's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback_hub import loopback_hub
from safetensors.torch import load_file, save_file
from test_budgets import ELASTIC
from test_slicing import DENSE, EXPERTS, MTP, build, cut
from tiny import prompt, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from nemotron_h_hf import NemotronHForCausalLM, NemotronHModel, manifest
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.elastic import child_files
from nemotron_h_hf.elastic.budgets import Budget
from nemotron_h_hf.model.loading import weight_files
from nemotron_h_hf.model.weights import find_tensors

HALF = {"hidden_size": 32, "mamba_num_heads": 4}


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """An elastic dense parent in many files."""
    folder = tmp_path_factory.mktemp("parent")
    tiny_model("dense", elastic=ELASTIC).save_pretrained(folder, max_shard_size="20KB")
    return folder


def same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def cut_model(shape: str, sizes: dict, **more) -> NemotronHForCausalLM:
    return build(*cut(tiny_model(shape, **more), Budget(name="x", **sizes)))


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("shape, sizes, more", [
    ("dense", DENSE, {}), ("moe", EXPERTS, {}), ("latent", {"hidden_size": 16, "layers": [1, 4]}, MTP),
    ("list", {"hidden_size": 24}, {"tie_word_embeddings": True}),
])  # fmt: skip
def test_same_weights_as_cutting_the_loaded_parent(tmp_path, shape, sizes, more, shard):
    tiny_model(shape, **more).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(weight_files(tmp_path)) > 1) == (shard == "20KB")
    sizes = {key: list(size) if isinstance(size, tuple) else size for key, size in sizes.items()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, budget=sizes)
    frozen = {key: tuple(size) if isinstance(size, list) else size for key, size in sizes.items()}
    expected = cut_model(shape, frozen, **more)
    same(model, expected)
    assert model.config.elastic is None
    assert num_parameters(model.config) == num_parameters(expected.config)


@pytest.mark.parametrize("budget, sizes", [
    ("half", HALF), (Budget(name="b", **HALF), HALF), (0.62, None), ("61%", None), ("200KiB@1Ki", None), ("full", {}),
])  # fmt: skip
def test_every_way_to_ask(parent, budget, sizes):
    model = AutoModelForCausalLM.from_pretrained(parent, budget=budget)
    whole = AutoModelForCausalLM.from_pretrained(parent)
    assert model.config.elastic is None and whole.config.elastic == ELASTIC
    if sizes is None:
        assert num_parameters(model.config) < 0.65 * num_parameters(whole.config)
    else:
        same(model, cut_model("dense", sizes))
    assert model.generate(prompt(), max_new_tokens=4, do_sample=False).shape == (1, 24)


def test_heads_and_classes(parent):
    expected = cut_model("dense", HALF)
    same(AutoModel.from_pretrained(parent, budget="half"), expected.model)
    same(NemotronHModel.from_pretrained(parent, budget="half"), expected.model)
    same(NemotronHForCausalLM.from_pretrained(str(parent), budget="half"), expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(parent, budget="half", num_labels=5)
    same(classifier.model, expected.model)
    assert classifier.score.weight.shape == (5, 32)


def test_arguments_of_from_pretrained_hold(parent):
    expected = cut_model("dense", HALF)
    low = AutoModelForCausalLM.from_pretrained(parent, budget="half", dtype=torch.bfloat16)
    same(low, expected.to(torch.bfloat16))
    for load in (AutoModelForCausalLM, NemotronHForCausalLM):
        model = load.from_pretrained(
            parent, budget="half", attn_implementation="eager", mamba_implementation="torch", use_cache=False,
            device_map="cpu", dtype="float64",
        )  # fmt: skip
        assert model.config._attn_implementation == "eager" and model.config.mamba_implementation == "torch"
        assert model.config.use_cache is False and model.dtype == torch.float64


def test_dtypes_of_the_files_are_kept(tmp_path, parent):
    """One layer of the parent has A_log in fp32, another in bf16, and the small model has lost the layer between them."""
    weights = {name: tensor.bfloat16() for name, tensor in load_file_all(parent).items()}
    weights["backbone.layers.5.mixer.A_log"] = weights["backbone.layers.5.mixer.A_log"].float()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((parent / "config.json").read_text().replace("float32", "bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, budget={"layers": [0, 3, 5]})
    found = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.dtype != torch.bfloat16}
    assert found == {"model.layers.2.mixer.A_log": torch.float32}


def load_file_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def test_other_names_and_stacked_experts_are_read(tmp_path):
    """As a state dict of the module holds them: `model.`, all experts of a layer in one tensor."""
    model = tiny_model("moe")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    same(
        NemotronHForCausalLM.from_pretrained(tmp_path, budget=EXPERTS | {"layers": [1, 2, 3, 4]}),
        cut_model("moe", EXPERTS),
    )


def test_subfolder_and_disk(tmp_path, parent):
    (tmp_path / "inner").symlink_to(parent, target_is_directory=True)
    expected = cut_model("dense", HALF)
    same(AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", budget="half"), expected)
    places = {"model.embeddings": "cpu", "model.layers": "disk", "model.norm_f": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        parent, budget="half", device_map=places, offload_folder=tmp_path / "off"
    )
    with torch.no_grad():
        # Offloaded layers are called as modules, which add up in another order.
        torch.testing.assert_close(model(prompt()).logits, expected(prompt()).logits, rtol=1e-5, atol=1e-5)


def test_little_of_the_parent_is_read(parent):
    """Rows that are cut away are never read: bytes by hand for each tensor."""
    _, info = AutoModelForCausalLM.from_pretrained(parent, budget="half", output_loading_info=True)
    d, rows = 48, 2 * 32 + 64 + 4  # of in_proj: gate and x of 4 heads, B and C, dt
    mamba = rows * d + (32 + 64) * 5 + 3 * 4 + 32
    out_proj = 32 * 64  # 32 of 48 rows, each read whole
    attention, mlp = 64 * d + 2 * 32 * d + 32 * 64, 80 * d + 32 * 80
    whole = 2 * 97 * d + 7 * 32 + 32
    assert info["bytes_read"] == 4 * (3 * (mamba + out_proj) + attention + 3 * mlp + whole)
    assert info["parent_bytes"] == sum(tensor.nbytes for tensor in load_file_all(parent).values())


def test_columns_are_cut_in_pieces(parent, monkeypatch):
    monkeypatch.setattr(child_files, "PIECE_BYTES", 1000)
    same(AutoModelForCausalLM.from_pretrained(parent, budget="half"), cut_model("dense", HALF))


def test_saved_it_is_an_ordinary_checkpoint(tmp_path, parent):
    model = AutoModelForCausalLM.from_pretrained(parent, budget="half")
    model.save_pretrained(tmp_path)
    assert "elastic" not in json.loads((tmp_path / "config.json").read_text())
    same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


# Bad input.


def test_budgets_that_are_not_there(parent, tmp_path):
    with pytest.raises(ValueError, match="budget='6b': allowed are 'full', 'half', 'mixed'"):
        AutoModelForCausalLM.from_pretrained(parent, budget="6b")
    with pytest.raises(ValueError, match="at most the parent's 48"):
        AutoModelForCausalLM.from_pretrained(parent, budget={"hidden_size": 64})
    with pytest.raises(ValueError, match="a multiple of 2"):
        AutoModelForCausalLM.from_pretrained(parent, budget={"mamba_num_heads": 5})
    with pytest.raises(ValueError, match="without a checkpoint"):
        NemotronHForCausalLM.from_pretrained(None, config=tiny_model("dense").config, state_dict={}, budget="half")
    tiny_model("dense").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no budgets"):
        AutoModelForCausalLM.from_pretrained(tmp_path, budget="half")


def test_files_that_are_not_the_parents(tmp_path, parent):
    config = (parent / "config.json").read_text()
    weights = load_file_all(parent)

    def refused(message: str, changed: dict[str, torch.Tensor], text: str = config) -> None:
        save_file(changed, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, budget="half")

    refused(
        "lack backbone.layers.6.norm.weight", {k: v for k, v in weights.items() if k != "backbone.layers.6.norm.weight"}
    )
    refused("have extra.weight", {**weights, "extra.weight": torch.zeros(3)})
    refused("has shape", {**weights, "backbone.norm_f.weight": torch.zeros(47)})
    refused("in I8", {**weights, "backbone.norm_f.weight": torch.zeros(48, dtype=torch.int8)})
    quantised = {**json.loads(config), "quantization_config": {"quant_method": "fp8"}}
    refused("quantised weights", weights, json.dumps(quantised))
    refused("NaN", {**weights, "backbone.norm_f.weight": torch.full((48,), float("nan"))})
    save_file(weights, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 100_000)
    with pytest.raises(ValueError, match="cut short"):
        AutoModelForCausalLM.from_pretrained(tmp_path, budget="half")


def write_manifest(folder: Path) -> Path:
    stored = find_tensors(weight_files(folder))
    found = manifest.make_manifest(stored, {name: manifest.checksum(entry) for name, entry in stored.items()})
    path = folder / manifest.NAME
    path.write_text(manifest.as_text(found))
    return path


@pytest.mark.parametrize("budget", [None, "half"])
def test_weights_that_changed_after_their_manifest(tmp_path, budget, monkeypatch):
    model = tiny_model("dense", elastic=ELASTIC)
    model.save_pretrained(tmp_path)
    path = write_manifest(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, budget=budget)
    weights = load_file(tmp_path / "model.safetensors")
    middle = {**weights, "lm_head.weight": weights["lm_head.weight"].clone()}
    middle["lm_head.weight"][48, 20] += 1  # away from both ends of the tensor
    save_file(middle, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="another checksum for 1 tensors, lm_head.weight first; write .* or remove"):
        AutoModelForCausalLM.from_pretrained(tmp_path, budget=budget)
    monkeypatch.setattr(manifest, "FULL_CHECK_BYTES", 1000)
    AutoModelForCausalLM.from_pretrained(tmp_path, budget=budget)  # of large weights the edges alone are read
    trained = {name: tensor + 1e-3 for name, tensor in weights.items()}
    save_file(trained, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="another fingerprint .* changed after it"):
        AutoModelForCausalLM.from_pretrained(tmp_path, budget=budget)
    changed = json.loads(path.read_text())
    for damage, message in [({"num_parameters": 3}, "num_parameters=3"), ({"version": 9}, "version 9"),
                            ({"tensors": {}}, "which have"), ({"tensors": None}, "is not a manifest")]:  # fmt: skip
        path.write_text(json.dumps({**changed, **damage}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, budget=budget)
    model.save_pretrained(tmp_path)  # new weights, which the old manifest does not speak of
    assert not path.exists()
    AutoModelForCausalLM.from_pretrained(tmp_path, budget=budget)


FROM_HUB = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import nemotron_h_hf
model, info = AutoModelForCausalLM.from_pretrained("owner/parent", budget="half", output_loading_info=True)
ids = torch.arange(3, 24)[None]
with torch.no_grad():
    print(json.dumps([model(ids).logits.double().sum().item(), info["bytes_read"], model.config.hidden_size]))
try:
    AutoModelForCausalLM.from_pretrained("owner/changed", budget="half")
except ValueError as error:
    print(error)
"""


def test_from_the_hub(tmp_path, parent):
    """By id: sharded files through transformers' resolution, and the manifest next to them."""
    with loopback_hub() as server:
        server.repos["owner/parent"] = {path.name: path.read_bytes() for path in parent.iterdir()}
        tiny_model("dense", elastic=ELASTIC, seed=1).save_pretrained(tmp_path / "changed", max_shard_size="20KB")
        write_manifest(tmp_path / "changed")
        other = (tmp_path / "changed" / manifest.NAME).read_bytes()
        server.repos["owner/changed"] = {**server.repos["owner/parent"], manifest.NAME: other}
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB], env=environment, capture_output=True, text=True, timeout=250
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    total, bytes_read, hidden_size = json.loads(lines[-2])
    with torch.no_grad():
        expected = cut_model("dense", HALF)(torch.arange(3, 24)[None]).logits
    assert abs(total - expected.double().sum().item()) < 1e-2
    assert hidden_size == 32 and bytes_read < 0.8 * sum(tensor.nbytes for tensor in load_file_all(parent).values())
    assert manifest.NAME in lines[-1] and "checksum" in lines[-1]
