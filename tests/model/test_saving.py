"""Saving over what is there: killed, read at the same time, by two at once, on full disks and in odd places; targets of commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from killing import POINTS, count_changes, kill_at, some_of
from safetensors.torch import load_file
from tiny import tiny_model
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_cli import main
from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.model.saving import LOCK_NAME, locked, saving, whole_file
from nemotron_h_hf.output_folders import is_made, note_made, resolve_target, stamps, writing

SIZES = {"one file": "1GB", "shards": "40KB", "other shards": "25KB"}


def models() -> tuple:
    """Two models of one shape; the second's configuration differs in what no tensor shows."""
    return tiny_model(seed=1), tiny_model(seed=2, layer_norm_epsilon=1e-3)


def as_loaded(folder: Path, model_class: type = NemotronHForCausalLM) -> tuple[dict, float] | None:
    """Tensors and the field that differs; None if it cannot be loaded."""
    if model_class is NativeForCausalLM and not (folder / "config.json").is_file():
        return None  # AutoModel refuses it; the class itself would build its default model
    try:
        model = model_class.from_pretrained(folder)
    except (OSError, ValueError):
        return None
    except Exception:  # of shards that are gone, in transformers' own class
        if model_class is NativeForCausalLM:
            return None
        raise
    return model.state_dict(), model.config.layer_norm_epsilon


def is_model(found: tuple[dict, float], model) -> bool:
    state = model.state_dict()
    same = all(torch.equal(found[0][name], tensor) for name, tensor in state.items())
    return same and found[1] == model.config.layer_norm_epsilon


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def by_glob(folder: Path) -> dict[str, torch.Tensor] | None:
    """What a reader makes of a folder that takes all model*.safetensors, as mlx-lm does."""
    if not (folder / "config.json").is_file():
        return None
    return {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("before, after", [
    ("one file", "one file"), ("one file", "shards"), ("shards", "one file"), ("shards", "shards"), ("shards", "other shards"),
])  # fmt: skip
@pytest.mark.parametrize("same_config", [True, False])
def test_killed_anywhere_it_is_the_old_the_new_or_an_error(before, after, same_config, tmp_path):
    old, new = models()
    if same_config:
        new.config.layer_norm_epsilon = old.config.layer_norm_epsilon

    def work():
        new.save_pretrained(tmp_path / "m", max_shard_size=SIZES[after])

    def fresh():
        old.save_pretrained(tmp_path / "m", max_shard_size=SIZES[before])

    fresh()
    count, outcomes = count_changes(work, tmp_path / "m"), []
    assert count >= 8
    for number in some_of(count, POINTS):
        fresh()
        assert not hidden(tmp_path / "m")  # what the dead one left is gone
        shutil.rmtree(tmp_path / "m")
        fresh()  # shards with the names that the next ones would have
        assert kill_at(work, tmp_path / "m", number)
        found, globbed = as_loaded(tmp_path / "m"), by_glob(tmp_path / "m")
        kinds = {"old": old, "new": new}
        outcomes.append(
            "error" if found is None else next((kind for kind, m in kinds.items() if is_model(found, m)), "mixed")
        )
        if globbed is not None:
            names = {"backbone.embeddings.weight": "model.embeddings.weight", "lm_head.weight": "lm_head.weight"}
            assert len({torch.equal(globbed[name], old.state_dict()[own]) for name, own in names.items()}) == 1
    assert set(outcomes) <= {"old", "new", "error"} and outcomes[0] == "old"
    if (before, after, same_config) == ("one file", "one file", True):
        assert "error" not in outcomes  # one rename is all
    work()
    assert is_model(as_loaded(tmp_path / "m"), new)
    assert not hidden(tmp_path / "m")


READER = """
import json, sys, time
from pathlib import Path
from test_saving import NativeForCausalLM, as_loaded
print("ready", flush=True)
found, errors, begun = [], 0, time.monotonic()
while time.monotonic() < begun + (5 if len(found) > 5 else 60):  # longer on a machine that is busy
    loaded = as_loaded(Path(sys.argv[1]), NativeForCausalLM)
    if loaded is None:
        errors += 1
    else:
        found.append([loaded[0][name].flatten()[0].item() for name in ("model.embeddings.weight", "lm_head.weight")])
print(json.dumps([found, errors]))
"""


def test_a_reader_during_saves_gets_the_old_or_the_new(tmp_path):
    """transformers' own class, without ours, loads while another process saves."""
    pair = models()
    heads = {(m.model.embeddings.weight[0, 0].item(), m.lm_head.weight[0, 0].item()) for m in pair}
    pair[0].save_pretrained(tmp_path / "m", max_shard_size="40KB")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    saves = 0
    with subprocess.Popen([sys.executable, "-c", READER, str(tmp_path / "m")], **how) as reader:
        assert reader.stdout.readline() == "ready\n"
        while reader.poll() is None:
            pair[saves % 2].save_pretrained(tmp_path / "m", max_shard_size=("40KB", "25KB", "1GB")[saves % 3])
            saves += 1
            time.sleep(0.1)
        found, errors = json.loads(reader.stdout.readline())
    print(f"{len(found)} loads, {errors} errors in {saves} saves")
    assert saves > 3 and len(found) > 5 and {tuple(pair) for pair in found} <= heads


def test_two_saves_at_once_leave_one_of_them_whole(tmp_path):
    pair = models()
    pids = []
    for model in pair:
        pid = os.fork()
        if not pid:
            try:
                for _ in range(5):
                    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    found = as_loaded(tmp_path / "m")
    assert is_model(found, pair[0]) or is_model(found, pair[1])
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {path.name for path in tmp_path.glob("m/*.safetensors")}
    assert not hidden(tmp_path / "m")


# Where a folder may be


def test_names_of_255_bytes(tmp_path):
    tiny_model().save_pretrained(tmp_path / ("n" * 255))
    with whole_file(tmp_path / ("f" * 255)) as part:
        part.write_text("all")
    assert (tmp_path / ("f" * 255)).read_text() == "all"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_parent_that_cannot_be_written(tmp_path):
    model, closed = tiny_model(), tmp_path / "closed"
    (closed / "open").mkdir(parents=True)
    (closed / "open").chmod(0o777)
    closed.chmod(0o755)
    way = [path for path in closed.parents if path.stat().st_uid == 0 and not path.stat().st_mode & 0o001]
    for path in way:  # pytest's own folders
        path.chmod(path.stat().st_mode | 0o011)
    pid = os.fork()
    if not pid:
        try:
            os.setgid(65534)
            os.setuid(65534)
            model.save_pretrained(closed / "open")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert sorted(os.listdir(closed / "open")) == ["config.json", "generation_config.json", "model.safetensors"]


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of this size, where mounting is allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        pytest.skip("no mount")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # a loaded model has its file open


def test_a_full_disk_leaves_what_was_there(tmp_path):
    old, new = models()
    with small_disk(tmp_path / "disk", "450k") as disk:
        old.save_pretrained(disk)  # a mount point itself
        before = sorted(os.listdir(disk))
        with pytest.raises(Exception, match="(?i)no space|enospc|os error 28"):
            new.save_pretrained(disk)
        assert is_model(as_loaded(disk), old) and sorted(os.listdir(disk)) == before
        (tmp_path / "link").symlink_to(disk)
        (disk / "model.safetensors").unlink()
        new.save_pretrained(tmp_path / "link")
        assert is_model(as_loaded(disk), new) and (tmp_path / "link").is_symlink()


# One writer


def test_the_lock_is_held_by_the_living(tmp_path):
    code = "from nemotron_h_hf.model.saving import locked; import time\n"
    code += f"with locked({str(tmp_path / 'x')!r}): print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(BlockingIOError, match=rf"another run is writing here \(process {other.pid} on"):
            with locked(tmp_path / "x"):
                pass
        other.send_signal(signal.SIGKILL)
    with locked(tmp_path / "x"), locked(tmp_path / "x"):
        assert (tmp_path / "x" / LOCK_NAME).is_file()
    assert os.listdir(tmp_path / "x") == []


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    with locked(tmp_path / "x"):
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path / "x"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["pretrain", "sft", "distill", "eval"])
def test_a_second_run_is_refused_and_removes_nothing(command, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"text": "a b c"}\n' * 9)
    data = ["--data", str(tmp_path / "data.jsonl")]
    more = {"pretrain": ["--sources", f"{{a: {{path: {data[1]}}}}}"], "eval": ["--tasks", "bpb"]}
    more = more.get(command, data) + ([] if command == "eval" else ["--use_cpu", "--total_tokens", "1M"])
    output = "--output" if command == "eval" else "--output_dir"
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "UNFINISHED").touch()
    with locked(tmp_path / "run"), ThreadPoolExecutor(1) as pool:  # another thread counts as another run
        assert pool.submit(main, [command, output, str(tmp_path / "run"), *more]).result() == 1
    assert "another run is writing here (process" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-3" / "UNFINISHED").is_file()


@pytest.mark.parametrize("command", ["pretrain", "sft", "distill"])
def test_a_run_does_not_write_into_its_model(command, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    data = ["--sources", "{a: {path: x.txt}}"] if command == "pretrain" else ["--data", "x.jsonl"]
    way = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "x" / ".." / "model" / "run")]
    assert main([command, *way, *data, "--use_cpu", "--total_tokens", "1M"]) == 1
    assert "is inside the source" in capsys.readouterr().err and not (tmp_path / "x").exists()


# Targets


@pytest.mark.parametrize("target, how", [
    ("source", "is"), ("source/.", "is"), ("x/../source", "is"), ("link", "is"), ("source/deep/er", "is inside"),
    ("link/new", "is inside"), ("x/../source/new", "is inside"), (".", "holds"), ("other/..", "holds"),
])  # fmt: skip
def test_a_source_is_no_target(target, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(ValueError, match=f"the target {target} {how} the source"):
        resolve_target(target, None, "owner/name", "source")
    assert not (tmp_path / "x").exists()
    assert resolve_target("sources", "source") == tmp_path / "sources"


def test_what_is_made_is_not_made_twice(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("1")
    made_from = {"source": stamps(tmp_path / "source"), "dtype": None}
    with writing(tmp_path / "t", tmp_path / "source") as target:
        assert not is_made(target, made_from)
        with saving(target) as staging:
            (staging / "model.safetensors").write_bytes(b"weights")
            (staging / "config.json").write_text("{}")
            note_made(staging, made_from)
    assert is_made(target, made_from)
    with pytest.raises(ValueError, match="there already: allowed is a new or empty folder"):
        is_made(target, {**made_from, "dtype": "float32"})
    (target / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ValueError, match="model.safetensors is missing or was changed"):
        is_made(target, made_from)
