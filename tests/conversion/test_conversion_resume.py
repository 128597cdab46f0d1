"""Interrupted conversions: finished files are kept after a check, unfinished ones never look finished."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from megatron_fixtures import FIXTURES, assert_same
from nemotron_h_hf.conversion import convert, read_megatron
from nemotron_h_hf.conversion.source_checkpoint import SourceCheckpoint

SUPER = FIXTURES["super19_t1p1_torch_dist"]
OPTIONS = {"max_shard_size": "60KB"}


class Stopped(Exception):
    """In the place of a crash."""


def stop_after(monkeypatch, count: int, kind: type = SourceCheckpoint) -> None:
    """Let reading fail after `count` tensors."""
    real, seen = kind.__getitem__, []

    def read(self, name):
        seen.append(name)
        if len(seen) > count:
            raise Stopped(name)
        return real(self, name)

    monkeypatch.setattr(kind, "__getitem__", read)


@pytest.mark.parametrize("count", [0, 1, 20, 50, 94])
def test_hugging_face_output_goes_on(tmp_path, monkeypatch, count):
    target = tmp_path / "hf"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, count)
        convert(SUPER.path, target, **OPTIONS)
    names = {path.name for path in target.iterdir()}
    assert not names & {"config.json", "model.safetensors.index.json", "conversion_report.json"}
    whole = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    report = convert(SUPER.path, target, **OPTIONS)
    assert sorted(report.files_kept) == sorted(path.name for path in whole)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in whole.items())
    assert len(report.tensors) == len([line for line in report.tensors.values() if line["sha256"]])
    assert_same(target, SUPER.expected())
    assert not list(target.glob("*.part")) and not list(target.glob("*.jsonl"))


@pytest.mark.parametrize("options", [OPTIONS, {"format": "torch", "tp": 2, "pp": 3, "ep": 2}])
def test_megatron_output_goes_on(tmp_path, monkeypatch, options):
    from nemotron_h_hf.model.weights import Checkpoint

    convert(SUPER.path, tmp_path / "hf")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 60, Checkpoint)
        convert(tmp_path / "hf", tmp_path / "run", **options)
    with pytest.raises(ValueError):
        read_megatron(tmp_path / "run")
    report = convert(tmp_path / "hf", tmp_path / "run", verify_output=True, **options)
    assert 0 < len(report.files_kept) < len(report.files)
    convert(tmp_path / "run", tmp_path / "back")
    assert_same(tmp_path / "back", SUPER.expected())


def test_a_finished_file_that_was_damaged_is_written_again(tmp_path, monkeypatch):
    target = tmp_path / "hf"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 50)
        convert(SUPER.path, target, **OPTIONS)
    first, second, *_ = sorted(target.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    os.truncate(second, 1000)
    report = convert(SUPER.path, target, **OPTIONS)
    assert first.name not in report.files_kept and second.name not in report.files_kept
    assert_same(target, SUPER.expected())


def test_a_journal_cut_in_its_last_line(tmp_path, monkeypatch):
    target = tmp_path / "hf"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 50)
        convert(SUPER.path, target, **OPTIONS)
    journal = target / "conversion_journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 10)
    report = convert(SUPER.path, target, **OPTIONS)
    assert len(report.files_kept) == len(list(target.glob("*.safetensors"))) - len(report.files) + len(
        report.files_kept
    )
    assert_same(target, SUPER.expected())


def test_folders_of_others_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        convert(SUPER.path, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    target = tmp_path / "hf"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 50)
        convert(SUPER.path, target, **OPTIONS)
    with pytest.raises(ValueError, match="another conversion, unfinished"):
        convert(SUPER.path, target, dtype="float32", **OPTIONS)
    convert(SUPER.path, target, **OPTIONS)
    with pytest.raises(ValueError, match="is not empty"):
        convert(SUPER.path, target, dtype="float32", **OPTIONS)


@pytest.mark.parametrize("options", [{}, {"to": "megatron"}, {"to": "megatron", "format": "torch", "tp": 2}])
def test_a_finished_conversion_is_already_there(tmp_path, options):
    source, target = SUPER.path, tmp_path / "out"
    if options:
        convert(source, tmp_path / "hf")
        source = tmp_path / "hf"
    convert(source, target, **options)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    report = convert(source, target, **options)
    assert report.already_there and "is already there and whole" in report.summary()[0]
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()} == before
    largest = max(before, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(ValueError, match="does not hold what was written|checksum|CRC|damaged"):
        convert(source, target, **options)


@pytest.mark.parametrize("torn", ["", '{"finger', "null\n", "\0" * 40])
def test_a_journal_without_its_first_line_begins_anew(tmp_path, torn):
    target = tmp_path / "hf"
    target.mkdir()
    (target / "conversion_journal.jsonl").write_text(torn)
    convert(SUPER.path, target, **OPTIONS)
    assert_same(target, SUPER.expected())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "conversion_journal.jsonl").write_text(torn)
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        convert(SUPER.path, tmp_path / "other", **OPTIONS)


def test_into_the_source_is_refused(tmp_path):
    source = tmp_path / "run"
    shutil.copytree(SUPER.path, source)
    for target, how in (
        (source, "is"),
        (source / "out", "is inside"),
        (tmp_path / "x" / ".." / "run", "is"),
        (tmp_path, "holds"),
    ):
        with pytest.raises(ValueError, match=f"the target .* {how} the source"):
            convert(source, target)
    assert not (tmp_path / "x").exists() and not (source / "out").exists()


def test_a_second_conversion_to_one_target_is_refused(tmp_path, monkeypatch):
    """While the first one writes; in another thread, which counts as another run."""
    real, met = SourceCheckpoint.__getitem__, []

    def read(self, name):
        if not met:
            met.append(None)
            with ThreadPoolExecutor(1) as pool:
                met[0] = pool.submit(convert, SUPER.path, tmp_path / "hf", **OPTIONS).exception()
        return real(self, name)

    monkeypatch.setattr(SourceCheckpoint, "__getitem__", read)
    convert(SUPER.path, tmp_path / "hf", **OPTIONS)
    assert isinstance(met[0], BlockingIOError) and "another run is writing here" in str(met[0])
    assert_same(tmp_path / "hf", SUPER.expected())


def big_checkpoint(folder: Path, num_bytes: int) -> dict[str, torch.Tensor]:
    """A run in torch_dist of about this size, many layers of equal tensors, and the weights it was made of."""
    from nemotron_h_hf.conversion import names

    from nemotron_h_hf import NemotronHConfig
    from nemotron_h_hf.checkpoint import save, write_text
    from nemotron_h_hf.model.weights import TensorSpec

    config = NemotronHConfig(
        vocab_size=1000, hidden_size=512, hybrid_override_pattern="M-" * max(1, num_bytes // 8_000_000), head_dim=64,
        num_attention_heads=8, num_key_value_heads=2, intermediate_size=2048, mamba_num_heads=16, mamba_head_dim=64,
        n_groups=2, ssm_state_size=64, architectures=["NemotronHForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    specs = [
        TensorSpec(name, torch.bfloat16, shape)
        for link in names.links(config)
        for name, shape in zip(link.hf, link.hf_shapes, strict=True)
    ]
    made = {spec.name: torch.randn(spec.shape, generator=generator).bfloat16() for spec in specs}
    save(folder / "hf", specs, made.items())
    write_text(folder / "hf" / "config.json", config.to_json_string(use_diff=False))
    convert(folder / "hf", folder / "run")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True])
def test_killed_at_random_points(tmp_path, back):
    """`kill -9` a dozen times at random moments, then let it finish: the same bits as without."""
    expected = big_checkpoint(tmp_path, 160_000_000)
    source, target = (tmp_path / "hf", tmp_path / "out") if back else (tmp_path / "run", tmp_path / "out")
    code = "import sys; from nemotron_h_hf.conversion import convert; print('ready', flush=True); "
    code += "convert(sys.argv[1], sys.argv[2], max_shard_size='8MB')"
    chance, kills = random.Random(0), 0
    for _ in range(12):
        command = [sys.executable, "-c", code, str(source), str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(chance.uniform(0.0, 1.5))
            process.kill()
            kills += process.wait() == -9
        finished = list(target.rglob("conversion_report.json"))
        if finished:
            break
        assert not list(target.glob("latest_*")) or list(target.rglob(".metadata"))
    assert kills > 0
    if not finished:
        report = convert(source, target, max_shard_size="8MB", verify_output=True)
        assert report.files_kept or kills < 3
    if back:
        convert(target, tmp_path / "again")
        assert_same(tmp_path / "again", expected)
    else:
        assert_same(target, expected)


def test_a_tokenizer_may_come_after(tmp_path):
    """The same command with --tokenizer: copied to a finished folder without one, never over one that is there."""
    target, tokenizer = tmp_path / "hf", tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    convert(SUPER.path, target)
    report = convert(SUPER.path, target, tokenizer=tokenizer)
    assert report.already_there and report.summary()[1] == "copied the tokenizer to it"
    assert (target / "tokenizer.json").read_text() == "{}"
    (target / "tokenizer.json").write_text('{"mine": 1}')
    report = convert(SUPER.path, target, tokenizer=tokenizer)
    assert report.summary()[1] == "its own tokenizer files were left alone"
    assert (target / "tokenizer.json").read_text() == '{"mine": 1}'


def test_another_configuration_is_another_conversion(tmp_path):
    """The weights are the same, config.json is not: it may not be said to be there already."""
    target, more = tmp_path / "hf", tmp_path / "config.json"
    convert(SUPER.path, target)
    more.write_text(json.dumps({"chunk_size": 16}))
    with pytest.raises(ValueError, match="is not empty"):
        convert(SUPER.path, target, config=more)
    convert(SUPER.path, tmp_path / "other", config=more)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["chunk_size"] == 16


@pytest.mark.parametrize("back", [False, True])
def test_a_source_that_is_saved_over_meanwhile(tmp_path, monkeypatch, back):
    from nemotron_h_hf.model.weights import Checkpoint

    kind, source, marker = SourceCheckpoint, Path(shutil.copytree(SUPER.path, tmp_path / "run")), "config.json"
    if back:
        convert(source, tmp_path / "hf")
        kind, source, marker = Checkpoint, tmp_path / "hf", "latest_checkpointed_iteration.txt"
    real = kind.__getitem__
    (largest,) = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)[
        -1:
    ]

    def read(self, name):
        if name in ("decoder.final_norm.weight", "backbone.norm_f.weight"):
            shutil.copy(largest, tmp_path / "new")
            os.replace(tmp_path / "new", largest)
        return real(self, name)

    monkeypatch.setattr(kind, "__getitem__", read)
    with pytest.raises(ValueError, match=f"{largest.name} was changed while it was read"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / marker).exists()
