"""`nemotron-h elastic-train`: from an ordered parent to budgets in its configuration; latency, memory, what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_run import read_metrics, write_texts
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM
from nemotron_h_hf.cost import cache_bytes, num_parameters, weight_bytes
from nemotron_h_hf.elastic.budgets import read_elastic
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.manifest import NAME as MANIFEST_NAME
from nemotron_h_hf.scripts import elastic_train, plot

CHOICES = {"hidden_size": [48, 32], "intermediate_size": [80, 48, 16], "mamba_num_heads": [8, 4]}


def write_parent(folder: Path, **elastic) -> Path:
    """A tiny checkpoint with a tokenizer whose weights count as ordered: a prefix is a prefix."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.save_pretrained(folder)
    model = tiny_model("dense", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1)
    entry = {"version": 1, "choices": CHOICES, "layer_order": [3, 6, 1, 0, 2, 5, 4], **elastic}
    model.config.elastic = entry
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    folder = tmp_path_factory.mktemp("box")
    write_texts(folder / "texts")
    write_parent(folder / "parent", budgets={"old": {"hidden_size": 32}})
    tiny_model("dense").save_pretrained(folder / "plain")
    return folder


def command(box, output_dir, *flags):
    return elastic_train.main([
        "--model", str(box / "parent"), "--data", str(box / "texts" / "low"), "--budgets", "{full: 1.0, half: 60%}",
        "--sequence_length", "32", "--max_steps", "4", "--per_device_train_batch_size", "2", "--use_cpu", "--logging_steps",
        "1", "--disable_tqdm", "true", "--save_steps", "2", "--learning_rate", "1e-3", "--output_dir", str(output_dir), *flags,
    ])  # fmt: skip


def test_from_a_parent_to_budgets_and_on_again(box, tmp_path, capsys):
    flags = ["--eval_data", str(box / "texts" / "high" / "0*.txt"), "--interpolate", "{middle: 0.8}", "--per_layer",
             "intermediate_size", "--stages", "[{until: 50%, sequence_length: 16}, {weights: {full: 0.5, half: 0.5}}]"]  # fmt: skip
    assert command(box, tmp_path, *flags) == 0
    said = capsys.readouterr().err
    assert "half: " in said and "held-out loss" in said
    assert (tmp_path / "model" / MANIFEST_NAME).is_file()
    elastic = read_elastic(NemotronHForCausalLM.from_pretrained(tmp_path / "model").config)
    assert {name: (b.trained, b.loss is not None) for name, b in elastic.budgets.items()} == {
        "full": (True, True), "half": (True, True), "middle": (False, True),
    }  # fmt: skip
    assert set(elastic.calibration) == {"loss", *CHOICES} and set(elastic.calibration["intermediate_size"]) == {
        "48",
        "16",
    }
    first = read_metrics(tmp_path)
    assert (tmp_path / "router.safetensors").is_file() and not list((tmp_path / "model").glob("router*"))
    assert command(box, tmp_path, *flags) == 0  # done already: loads and says the same
    assert said.splitlines()[-2:] == capsys.readouterr().err.splitlines()[-2:]
    assert [row for row in read_metrics(tmp_path) if "loss" in row] == [row for row in first if "loss" in row]
    target = tmp_path / "choices.png"
    assert plot.main([str(tmp_path), "--x", "step", "--y", "size_*,choice_half_*", "--output", str(target)]) == 0
    assert target.stat().st_size > 1000 and "choice_half_hidden_size" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing that matches sise_"):
        plot.main([str(tmp_path), "--y", "sise_*"])


def test_a_missed_size_is_told(box, tmp_path, capsys):
    """A router that had no time stays where it began; one that had some comes to its target."""
    share = {}
    for steps in ("1", "80"):
        flags = ["--budgets", "{full: 1.0, half: 63%}", "--max_steps", steps, "--save_steps", steps,
                 "--router_warmup_steps", "1"]  # fmt: skip
        assert command(box, tmp_path / steps, *flags, "--seed", "3") == 0
        said = capsys.readouterr().err
        share[steps] = float(re.search(r"half: [\d,]+ parameters \(([\d.]+)%\)", said)[1])
        assert ("half: asked for 63.0% of the parent's parameters, got" in said) == (steps == "1")
    assert abs(share["1"] / 63 - 1) > 0.05 > abs(share["80"] / 63 - 1)


def test_by_memory_and_by_measured_time(box, tmp_path):
    table = tmp_path / "times.json"
    assert command(box, tmp_path / "a", "--metric", "latency", "--latency_table", str(table), "--measure_latency") == 0
    assert json.loads(table.read_text())["choices"] == CHOICES
    assert command(box, tmp_path / "a", "--metric", "latency", "--latency_table", str(table)) == 0
    assert command(box, tmp_path / "b", "--metric", "memory", "--cost_context", "100", "--cost_batch_size", "2") == 0
    row = next(row for row in read_metrics(tmp_path / "b") if "loss" in row)
    assert row["target_half"] == pytest.approx(0.6) and row["size_full"] <= 1
    config = NemotronHForCausalLM.from_pretrained(tmp_path / "b" / "model").config
    half = resolve(config, read_elastic(config).budgets["half"]).config
    sizes = [weight_bytes(c) + 2 * cache_bytes(c, 100) for c in (config, half)]
    assert sizes[1] < sizes[0] and num_parameters(half) < num_parameters(config)
    with pytest.raises(ValueError, match="a new file, this one exists"):
        command(box, tmp_path / "a", "--metric", "latency", "--latency_table", str(table), "--measure_latency")


def test_another_teacher_and_next_token_loss(box, tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tiny_model("square", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    flags = ["--teacher", str(tmp_path / "teacher"), "--cross_entropy_weight", "0.5", "--choices", "{layers: [6, 5]}"]
    assert command(box, tmp_path / "run", *flags, "--hard_share", "1.0") == 0
    for row in (row for row in read_metrics(tmp_path / "run") if "loss" in row):
        drawn = [name for name in ("full", "half") if f"loss_{name}" in row]
        assert all(row[f"loss_{n}"] == pytest.approx((row[f"kl_{n}"] + row[f"cross_entropy_{n}"]) / 2) for n in drawn)
    half = read_elastic(NemotronHForCausalLM.from_pretrained(tmp_path / "run" / "model").config).budgets["half"]
    assert half.layers is not None and half.loss is None and len(half.layers) in (5, 6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--budgets", "{half: 0.5}"], "just one is the parent"),
        (["--budgets", "{full: 1.0, half: 5T}"], "budgets.half='5T'"),
        (["--choices", "{hidden_size: [47], mamba_num_heads: [3]}"], "a multiple of 2"),
        (["--stages", "[{weights: {quarter: 1}}]"], "='quarter': allowed is full, half"),
        (["--metric", "latency"], "latency_table"),
        (["--measure_latency"], "latency_table=None: allowed is the file to write"),
        (["--gumbel_temperature", "1.0"], "temperature=.*: allowed are"),
        (["--optimizer", "muon"], "allowed is adamw"),
        (["--interpolate", "{tiny: 0.1}"], "interpolate.tiny=0.1: allowed is 0.6 or more, as is trained"),
        (["--interpolate", "{half: 0.7}"], "interpolate='half': allowed is names that budgets does not have"),
        (["--router_lerning_rate", "1"], "did you mean 'router_learning_rate'"),
        (["--model", "{}/plain"], "choices={}: allowed is sizes by field; nemotron-h elasticize"),
    ],
)
def test_command_refuses(flags, message, box, tmp_path):
    with pytest.raises(ValueError, match=message):
        command(box, tmp_path / "run", *(flag.replace("{}", str(box)) for flag in flags))


def test_budgets_are_trained_on_with_their_sizes(box, tmp_path):
    assert command(box, tmp_path / "first") == 0
    before = read_elastic(NemotronHForCausalLM.from_pretrained(tmp_path / "first" / "model").config)
    flags = ["--keep_sizes", "--sandwich", "--live_teacher", "--gradient_accumulation_steps", "2", "--eval_data",
             str(box / "texts" / "high" / "0*.txt"), "--save_steps", "2"]  # fmt: skip
    words = ["--model", str(tmp_path / "first" / "model"), "--data", str(box / "texts" / "low"), "--sequence_length", "32",
             "--max_steps", "4", "--use_cpu", "--disable_tqdm", "true", "--learning_rate", "1e-3",
             "--output_dir", str(tmp_path / "on")]  # fmt: skip
    assert elastic_train.main([*words, *flags]) == 0
    elastic = read_elastic(NemotronHForCausalLM.from_pretrained(tmp_path / "on" / "model").config)
    assert {n: b.sizes() for n, b in elastic.budgets.items()} == {n: b.sizes() for n, b in before.budgets.items()}
    assert all(b.trained and b.loss for b in elastic.budgets.values())
    assert (elastic.choices, elastic.layer_order) == (before.choices, before.layer_order)
    shutil.rmtree(tmp_path / "on" / "model")
    assert elastic_train.main([*words, *flags]) == 0  # from the last checkpoint
    for more, message in (
        (["--budgets", "{full: 1.0}"], "budgets={'full': 1.0}: allowed is none with keep_sizes"),
        (["--metric", "memory"], "metric='memory': allowed is parameters with keep_sizes"),
        (
            ["--model", str(box / "plain")],
            "keep_sizes=\\[\\]: allowed is a parent that names itself and smaller budgets",
        ),
    ):
        with pytest.raises((ValueError, SystemExit), match=message):
            elastic_train.main([*words, *flags, *more, "--output_dir", str(tmp_path / "no")])


@pytest.mark.slow
def test_layers_left_out_on_two_processes_with_checkpointing(box, tmp_path):
    """DDP: half of the micro-steps give no gradient to two of the layers."""
    parent = write_parent(tmp_path / "parent", budgets={"full": {}, "shallow": {"layers": [0, 1, 2, 4, 5]}})
    words = ["-m", "nemotron_h_hf.scripts.elastic_train", f"--model={parent}", f"--data={box / 'texts' / 'low'}",
             "--keep_sizes", "--sandwich", "--live_teacher", "--gradient_accumulation_steps=2", "--gradient_checkpointing=true",
             "--sequence_length=32", "--max_steps=3", "--use_cpu", "--disable_tqdm=true", "--learning_rate=1e-3",
             "--logging_steps=1", "--save_strategy=no"]  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]  # fmt: skip
    for name, before, size in (("one", [], 2), ("two", launch, 1)):
        flags = [f"--per_device_train_batch_size={size}", f"--output_dir={tmp_path / name}"]
        done = subprocess.run([sys.executable, *before, *words, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([row for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    for figure in ("loss", "grad_norm", "kl_full", "kl_shallow"):
        assert [row[figure] for row in two] == pytest.approx([row[figure] for row in one], rel=2e-3, abs=1e-6), figure
