"""`nemotron-h push` against a hub on loopback, and the files that it writes on the way."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, loopback_hub
from tiny import put_code_next_to
from transformers import AutoModelForCausalLM

from nemotron_h_hf import EMBEDDED_MODEL, hub
from nemotron_h_hf.scripts import push
from nemotron_h_hf.tokenizer_files import save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model without a card, with things in it that must stay behind."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(EMBEDDED_MODEL, folder, ignore=shutil.ignore_patterns("*.md"))
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("local")
    (folder / "model.safetensors.tmp").write_bytes(b"unfinished")
    return folder


def run_push(server: LoopbackHub, *argv: object) -> subprocess.CompletedProcess:
    """The command in its own process, because huggingface_hub reads its environment when imported."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_loopback",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "nemotron_h_hf.scripts.push", *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_push_sends_adapters(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin"):
        (tmp_path / name).write_text("{}")
    with loopback_hub() as server:
        done = run_push(server, tmp_path, "owner/adapters")
    assert done.returncode == 0, done.stderr
    assert set(server.repos["owner/adapters"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_push_sends_the_checkpoint_with_card_and_code(folder):
    before = snapshot(folder)
    with loopback_hub() as server:
        done = run_push(server, folder, "owner/tiny", "--private", "--with-code")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{server.url}/owner/tiny"
    assert server.private == {"owner/tiny": True} and server.tokens == {"Bearer hf_loopback"}
    received = server.repos["owner/tiny"]
    assert received["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(server.objects) >= 1, "the weights did not go through LFS"
    assert {"README.md", "config.json", "tokenizer.json", "modeling_nemotron_h.py"} <= set(received)
    assert not {"optimizer.pt", ".cache/secret", "model.safetensors.tmp", "__init__.py"} & set(received)
    auto_map = json.loads(received["config.json"])["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_nemotron_h.NemotronHForCausalLM"
    for target in auto_map.values():
        module, name = target.split(".")
        assert f"class {name}(" in received[f"{module}.py"].decode()
    assert snapshot(folder) == before, "the user's folder was changed"


def test_dry_run_sends_nothing_and_shows_the_card(folder):
    with loopback_hub() as server:
        done = run_push(server, folder, "owner/tiny", "--dry-run", "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert server.repos == {} and "dry run" in done.stderr
    assert "license: apache-2.0" in done.stdout and "# tiny" in done.stdout


def test_card_states_the_models_own_facts(folder):
    card = hub.model_card(folder, "owner/tiny")
    config = json.loads((folder / "config.json").read_text())
    num_attention_layers = config["hybrid_override_pattern"].count("*")
    _, contents = hub.load_target(folder)
    num_parameters = sum(math.prod(tensor.shape) for tensor in contents.tensors.values())
    first = next(iter(contents.tensors.values()))
    element_bytes = first.num_bytes // math.prod(first.shape)
    kv_bytes = 2 * num_attention_layers * config["num_key_value_heads"] * config["head_dim"] * element_bytes
    assert f"| parameters | {num_parameters:,} (" in card
    assert f"| pattern | `{config['hybrid_override_pattern']}` |" in card
    assert f"| KV cache | {hub.human_bytes(kv_bytes)} per token" in card
    assert "$" not in card and "license:" not in card


def test_a_card_that_is_there_is_sent_as_it_is(folder):
    (folder / "README.md").write_text("my own words")
    plan = hub.plan_upload(folder, "owner/tiny")
    assert plan["README.md"] == folder / "README.md"
    replaced = hub.plan_upload(folder, "owner/tiny", overwrite_card=True)
    assert replaced["README.md"].decode().count("# tiny\n") == 1
    assert (folder / "README.md").read_text() == "my own words"


def test_tokenizer_class_is_one_that_every_reader_knows(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "TokenizersBackend"}))
    sent = json.loads(hub.plan_upload(folder, "owner/tiny")["tokenizer_config.json"])
    assert sent == {**config, "tokenizer_class": "PreTrainedTokenizerFast"}


def test_save_tokenizer_writes_the_plain_class(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    save_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "def f(x):\n    return x"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_only_what_a_model_repository_holds_is_sent(folder):
    names = (
        "s.pickle",
        "a.joblib",
        "w.BIN",
        "core",
        "core.1234",
        "token",
        ".env",
        "hf_token.txt",
        "train.py",
        "id_rsa",
    )
    for name in (*names, "model-00002-of-00003.safetensors.part", "model-00002-of-00003.safetensors"):
        (folder / name).write_text("x")
    for name in ("wandb", "runs", "checkpoint-5"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    plan = hub.plan_upload(folder, "owner/tiny")
    expected = {path.name for path in Path(EMBEDDED_MODEL).iterdir() if path.suffix != ".md"} | {"README.md"}
    assert set(plan) == expected
    assert {*names, "wandb/", "checkpoint-5/"} <= set(hub.left_behind(folder, plan))
    assert set(hub.plan_upload(folder, "owner/tiny", include=["train.py"])) == expected | {"train.py"}
    with pytest.raises(ValueError, match="include='nothing'"):
        hub.plan_upload(folder, "owner/tiny", include=["nothing"])


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "LICENSE", "README.md"])
def test_links_out_of_the_folder_are_not_followed(folder, name):
    key = folder.parent / "id_rsa"
    key.write_text("KEY")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(key)
    if name == "notes.txt":
        assert name not in hub.plan_upload(folder, "owner/tiny")
    with pytest.raises(ValueError, match=f"{name} is a link out of the folder"):
        hub.plan_upload(folder, "owner/tiny", include=[name])


def test_paths_of_this_machine_stay_here(folder):
    report = {"source": "/home/me/secret/run", "target": "../out/tiny", "notes": ["read /home/me/secret/run/x.pt"],
              "tensors": {"a.b": {"files": "iter_1/x.distcp"}}, "logits": {"reference": "/mnt/me/hf"}}  # fmt: skip
    (folder / "conversion_report.json").write_text(json.dumps(report))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/secret/run"}))
    plan = hub.plan_upload(folder, "owner/tiny", with_code=True)
    sent = json.loads(plan["conversion_report.json"])
    assert sent == {"source": "run", "target": "tiny", "notes": ["read x.pt"], "tensors": report["tensors"],
                    "logits": {"reference": "hf"}}  # fmt: skip
    assert json.loads(plan["config.json"])["_name_or_path"] == "run"


@pytest.mark.parametrize("base, sent", [("/home/me/base", "base"), ("../base", "base"), ("owner/base", "owner/base")])
def test_adapters_do_not_tell_where_their_base_lay(tmp_path, base, sent):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 2}))
    card = f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n---\nSee https://hf.co/a/b and/or {base}.\n"
    (tmp_path / "README.md").write_text(card)
    plan = hub.plan_adapter_upload(tmp_path)
    read = {name: source if isinstance(source, bytes) else source.read_bytes() for name, source in plan.items()}
    assert json.loads(read["adapter_config.json"]) == {"base_model_name_or_path": sent, "r": 2}
    assert b"/home/me" not in read["README.md"] and b"../" not in read["README.md"]
    assert b"See https://hf.co/a/b and/or " in read["README.md"]


def test_incomplete_checkpoint_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"nothing was sent; missing or damaged: model\.safetensors"):
        hub.plan_upload(folder, "owner/tiny")


@pytest.mark.parametrize(
    "argv, named", [(["nowhere", "a/b"], "folder='nowhere'"), ([EMBEDDED_MODEL, "b"], "repo_id='b'")]
)
def test_bad_arguments_are_named(argv, named):
    with pytest.raises(ValueError, match=named):
        push.main(argv)


def test_code_of_others_is_not_replaced(folder):
    (folder / "modeling_nemotron_h.py").write_text("# changed by its owner\n")
    with pytest.raises(ValueError, match=r"modeling_nemotron_h\.py exists with other content"):
        hub.plan_upload(folder, "owner/tiny", with_code=True)


@pytest.mark.slow
def test_attached_code_runs_without_the_package(folder, tmp_path):
    """In a process that cannot import the package: the files next to the weights give the same logits."""
    put_code_next_to(folder)
    code = """
import sys
sys.modules["nemotron_h_hf"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
print(model(torch.arange(9)[None]).logits.double().abs().sum().item())
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(reference_sum(folder), rel=1e-9)


def reference_sum(folder: Path) -> float:
    """What the installed package computes for the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return model(torch.arange(9)[None]).logits.double().abs().sum().item()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_older_copy_of_the_code_goes_whole_and_is_noticed(folder, capsys):
    """It may have files that the package has no more: all that its files import goes along."""
    put_code_next_to(folder)
    (folder / "arguments.py").rename(folder / "older_arguments.py")
    (folder / "unrelated.py").write_text("")
    for path in folder.glob("modeling_*.py"):
        path.write_text(path.read_text().replace("from .arguments import", "from .older_arguments import"))
    plan = hub.plan_upload(folder, "owner/tiny")
    assert {"modeling_nemotron_h.py", "older_arguments.py"} <= plan.keys() and "unrelated.py" not in plan
    assert push.main([str(folder), "owner/tiny", "--dry-run"]) == 0
    assert "not this version's: modeling_nemotron_h.py;" in capsys.readouterr().err


def test_a_map_of_code_that_is_not_there_is_not_sent(folder, capsys):
    """A model that was loaded from a folder with code and saved elsewhere has the map alone: remote code would not be found."""
    put_code_next_to(folder)
    saved = folder.parent / "saved"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(saved)
    assert "auto_map" in json.loads((saved / "config.json").read_text())
    assert "auto_map" not in json.loads(hub.plan_upload(saved, "owner/tiny")["config.json"])
    assert "auto_map" in json.loads(hub.plan_upload(saved, "owner/tiny", with_code=True)["config.json"])
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "owner/other--configuration_x.XConfig", "AutoTokenizer": ["gone.X", None]}
    (saved / "config.json").write_text(json.dumps(config))
    sent = json.loads(hub.plan_upload(saved, "owner/tiny")["config.json"])["auto_map"]
    assert sent == {"AutoConfig": "owner/other--configuration_x.XConfig"}
    assert push.main([str(saved), "owner/tiny", "--dry-run"]) == 0
    assert "not this version's" not in capsys.readouterr().err
