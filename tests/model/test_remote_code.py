"""The flat folder of model code alone: what `trust_remote_code=True` runs where the package is not installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback_hub import loopback_hub
from safetensors.torch import load_file
from tiny import put_code_next_to, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, hub

PROMPT = "def load(path):\n"
ELASTIC = {"version": 1, "budgets": {"half": {"hidden_size": 32}}}

# Run where the package cannot be imported: text and logits of every folder, then saved once more with its code.
WITHOUT_PACKAGE = """
import json, sys
sys.modules["nemotron_h_hf"] = None
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
out, folders = {}, sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(model.config).__module__.startswith("transformers_modules."), type(model.config)
    ids = torch.arange(3, 24)[None]
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, folder + "/remote.logits")
    out[folder] = model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    model.save_pretrained(folder + ".again")
tokenizer = AutoTokenizer.from_pretrained(folders[0])
ids = tokenizer(sys.stdin.read(), return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(folders[0], trust_remote_code=True)
out["text"] = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0])
cache = type(model(ids, use_cache=True).past_key_values).__name__
assert cache == "DynamicHybridCache", cache

from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as Native
native, info = Native.from_pretrained(folders[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
print(json.dumps(out))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Both processes have to divide their sums alike; other test files leave the number of threads as they please."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """The embedded model, and tiny ones, each with the code next to the weights."""
    root = tmp_path_factory.mktemp("remote")
    shutil.copytree(EMBEDDED_MODEL, root / "embedded")
    for shape in ("dense", "moe"):
        tiny_model(shape).save_pretrained(root / shape)
    tiny_model("dense", elastic=ELASTIC).save_pretrained(root / "parent")
    tiny_model("moe", num_experts_per_tok=[3, 1], sliding_window=6).save_pretrained(root / "puzzle")
    folders = [root / name for name in ("embedded", "dense", "moe", "parent", "puzzle")]
    for folder in folders:
        put_code_next_to(folder)
    return folders


@pytest.fixture(scope="module")
def answer(folders, tmp_path_factory) -> dict:
    """What a process without the package printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, *map(str, folders)]
    done = subprocess.run(command, env=environment, input=PROMPT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_same_logits_and_tokens(folders, answer):
    for folder in folders:
        model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.arange(3, 24)[None]
        assert type(model).__module__ == "nemotron_h_hf.model.modeling_nemotron_h"
        with torch.no_grad():
            expected = model(ids).logits
        torch.testing.assert_close(load_file(folder / "remote.logits")["logits"], expected, rtol=0, atol=1e-6)
        assert model.generate(ids, max_new_tokens=8, do_sample=False).tolist() == answer[str(folder)]


def test_same_text(folders, answer):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[0]), AutoTokenizer.from_pretrained(folders[0])
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0]) == answer["text"]


def test_saving_there_carries_the_code_and_the_released_names(folders, answer):
    for folder in folders:
        again = Path(f"{folder}.again")
        assert set(hub.code_files()) <= {path.name for path in again.iterdir()}
        config = json.loads((again / "config.json").read_text())
        name = "NemotronHPuzzleForCausalLM" if folder.name == "puzzle" else "NemotronHForCausalLM"
        assert config["auto_map"]["AutoModelForCausalLM"] == f"modeling_nemotron_h.{name}"
        # Kept, though it is not read there
        assert config.get("elastic") == json.loads((folder / "config.json").read_text()).get("elastic")
        first, second = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


PUSH = """
import sys
import nemotron_h_hf
from tiny import tiny_model
nemotron_h_hf.NemotronHConfig.register_for_auto_class()
nemotron_h_hf.NemotronHForCausalLM.register_for_auto_class("AutoModelForCausalLM")
model = tiny_model()
model.save_pretrained(sys.argv[1])
model.push_to_hub("owner/tiny")
"""


def test_save_pretrained_and_push_to_hub_can_carry_the_code(tmp_path):
    """transformers' own way, `register_for_auto_class`, finds every file of the flat folder."""
    with loopback_hub() as server:
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PUSH, str(tmp_path / "saved")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    received = server.repos["owner/tiny"]
    for name, content in hub.code_files().items():
        assert saved[name] == content and received[name] == content, name
    assert received["model.safetensors"] == saved["model.safetensors"]
    for config in (saved["config.json"], received["config.json"]):
        auto_map = json.loads(config)["auto_map"]
        assert auto_map["AutoModelForCausalLM"] == "modeling_nemotron_h.NemotronHForCausalLM"
        assert auto_map["AutoConfig"] == "configuration_nemotron_h.NemotronHConfig"
