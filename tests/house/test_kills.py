"""Every command that writes, killed at many moments and started again: it resumes, and its result is that of a run left alone.

`make test-kills`. Prints for each command how often it was killed, in how many changes of the disk.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from killing import POINTS, count_changes, kill_at, run_once, some_of
from megatron_fixtures import FIXTURES
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_run import write_texts
from transformers import AutoTokenizer

from nemotron_h_cli import main
from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.scripts import (
    convert,
    distill,
    elastic_train,
    elasticize,
    eval,  # noqa: A004
    export,
    merge,
    minipuzzle,
    pretrain,
    sft,
    slice,  # noqa: A004
)

# Imported once, before the children fork
assert all((convert, distill, elastic_train, elasticize, eval, export, merge, minipuzzle, pretrain, sft, slice))

# What a clock, a path or the road to the result is in; the rest must be the same bytes.
UNSTEADY = {"conversion_report.json", "conversion_report.txt", "training_args.bin", "trainer_state.json", "metrics.jsonl",
            "whole.json", ".nemotron-h.json", "elastic_manifest.json", "common.pt", ".metadata", "report.json", "log.jsonl",
            "results.json", "samples.jsonl", "held_out.json", "rng_state.pth", "scores.json", "ranked.json", "student.json",
            "minipuzzle.json", "report.html", "report.md"}  # fmt: skip
TRAIN = ["--sequence_length", "32", "--max_steps", "4", "--per_device_train_batch_size", "2", "--use_cpu", "--disable_tqdm",
         "true", "--save_steps", "2", "--learning_rate", "1e-3", "--logging_steps", "1", "--report_to", "none"]  # fmt: skip
ELASTIC = {
    "version": 1, "budgets": {"small": {"hidden_size": 32, "mamba_num_heads": 4}},
    "choices": {"hidden_size": [48, 32], "intermediate_size": [80, 48], "mamba_num_heads": [8, 4]},
    "layer_order": [3, 6, 1, 0, 2, 5, 4],
}  # fmt: skip


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A model, a parent, adapters, a run, records and texts, all tiny."""
    box, tokenizer = tmp_path_factory.mktemp("box"), AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    write_texts(box / "texts")
    (box / "data.jsonl").write_text("".join(json.dumps({"text": f"number {n} " * 9}) + "\n" for n in range(60)))
    model = tiny_model("dense", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1)
    model.save_pretrained(box / "model", max_shard_size="200KB")
    model.config.elastic = ELASTIC
    model.save_pretrained(box / "parent", max_shard_size="200KB")
    for name in ("model", "parent"):
        tokenizer.save_pretrained(box / name)
    command = ["sft", "--model", str(box / "model"), "--data", str(box / "data.jsonl"), *TRAIN]
    assert main([*command, "--output_dir", str(box / "run")]) == 0
    assert main([*command, "--lora_rank", "2", "--output_dir", str(box / "lora")]) == 0
    return box


def commands(box: Path, out: Path) -> dict[str, list[str]]:
    """The commands, each with OUT as its target."""
    source, data, texts = str(box / "model"), str(box / "data.jsonl"), str(box / "texts" / "low")
    megatron = str(FIXTURES["super19_t1p1_torch_dist"].path)
    train = [*TRAIN, "--output_dir", str(out)]
    few = ["--rows", "2", "--held_out_rows", "1", "--sequence_length", "48", "--depth_rows", "1", "--removals", "1",
           "--choices", "hidden_size=32", "--calibration", data, "--budget", "a:hidden_size=32", "--device", "cpu"]  # fmt: skip
    stages = ["--sequence_length", "32", "--width_samples", "4", "--layer_samples", "2", "--ranking_tokens", "64", "--data", data,
              "--max_parameters", "255K", "--short_tokens", "128", "--finalists", "2", "--long_tokens", "128", "--device", "cpu",
              "--sizes", "{intermediate_size: [80]}", "--controls", "0", "--distill",
              "{per_device_train_batch_size: 2, save_steps: 1, report_to: none, disable_tqdm: true}"]  # fmt: skip
    return {
        "minipuzzle": ["minipuzzle", source, str(out / "work"), "--output", str(out / "student"), *stages],
        "convert to hf": ["convert", megatron, str(out), "--max-shard-size", "20KB"],
        "convert to torch_dist": ["convert", source, str(out), "--max-shard-size", "200KB"],
        "convert to torch": ["convert", source, str(out), "--format", "torch", "--pp", "3"],
        "slice": ["slice", str(box / "parent"), str(out), "--budget", "small", "--max-shard-size", "100KB"],
        "elasticize": ["elasticize", source, str(out), *few],
        "merge": ["merge", str(box / "lora" / "adapter"), "--base", source, "--output", str(out)],
        "export": ["export", str(box / "run"), str(out), "--max-shard-gb", "0.0002"],
        "pretrain": ["pretrain", "--model", source, "--sources", f"{{low: {{path: {texts}}}}}", "--total_tokens", "256", *train],
        "sft": ["sft", "--model", source, "--data", data, *train],
        "sft with LoRA": ["sft", "--model", source, "--data", data, "--lora_rank", "2", *train],
        "distill": ["distill", "--model", source, "--teacher", str(box / "parent"), "--data", data, *train],
        "distill, the cache": ["distill", "--model", source, "--teacher", source, "--data", data, *TRAIN, "--top_k", "4",
                               "--cache_teacher", str(out)],
        "elastic-train": ["elastic-train", "--model", str(box / "parent"), "--data", data, "--budgets",
                          "{full: 1.0, half: 60%}", *train],
        "eval": ["eval", "--model", source, "--tasks", "bpb", "--output", str(out), "--device", "cpu"],
    }  # fmt: skip


NAMES = list(commands(Path("box"), Path("out")))


@pytest.mark.kills
@pytest.mark.parametrize("name", NAMES)
def test_killed_it_goes_on(name, box, tmp_path, capsys):
    argv = commands(box, tmp_path / "out")[name]

    def work() -> int:
        return main(argv)

    count = count_changes(work, tmp_path / "out")
    expected = result(tmp_path / "out")
    assert expected
    kills = bad = 0
    for number in some_of(count, POINTS):
        shutil.rmtree(tmp_path / "out")
        if not kill_at(work, tmp_path / "out", number):
            continue
        kills += 1
        for again in (number % 7 + 1, None):  # once more, soon after it resumed, then left alone
            if again is not None:
                kills += kill_at(work, tmp_path / "out", again)
            elif code := run_once(work, tmp_path / "out"):
                bad += 1
                print(
                    f"{name}, change {number} of {count}: exit code {code}\n{(tmp_path / 'output').read_text()[-600:]}"
                )
            elif found := differences(expected, result(tmp_path / "out")):
                bad += 1
                print(f"{name}, change {number} of {count}: other results in {found[:5]}")
    with capsys.disabled():
        print(f"\n{name}: {kills} kills at {count} changes of the disk, {bad} did not resume", file=sys.stderr)
    assert kills and not bad


@pytest.mark.kills
def test_a_checkpoint_of_the_command_loads(box, tmp_path):
    """The comparison above is of something: what slice and merge make are models."""
    for name in ("slice", "merge", "export", "convert to hf"):
        assert main(commands(box, tmp_path / name)[name]) == 0
        assert all(torch.isfinite(w).all() for w in NemotronHForCausalLM.from_pretrained(tmp_path / name).parameters())


def result(folder: Path) -> dict[str, str]:
    """File -> checksum of what a command made. Leftovers count; of files that differ by clock or road, only their names."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("events.out"))
    return {path.relative_to(folder).as_posix(): "" if path.name in UNSTEADY else checksum(path) for path in files}


def checksum(path: Path) -> str:
    """Of all bytes, but of a safetensors file of its tensors: the library orders metadata by chance."""
    digest = hashlib.sha256()
    if path.suffix != ".safetensors":
        digest.update(path.read_bytes())
    else:
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
