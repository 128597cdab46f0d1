"""What sft, distill and elastic-train do alike: order of the data, evaluation, upload of the result; what --help shows."""

import json
import re

import pytest
import torch
from test_elastic_train import write_parent
from tiny_run import read_metrics
from transformers import AutoTokenizer

import nemotron_h_cli as cli
from nemotron_h_hf import EMBEDDED_MODEL, hub
from nemotron_h_hf.scripts import distill, elastic_train, sft
from nemotron_h_hf.training.arguments import NemotronHTrainingArguments
from nemotron_h_hf.training.data_arguments import DataArguments
from nemotron_h_hf.training.rows import make_rows

ROWS = {
    "sft": lambda data, training, tokenizer: sft.rows_of(data, False, training, tokenizer),
    "distill": make_rows,
    "elastic": make_rows,
}
FLAGS = {
    "sft": [],
    "distill": ["--init", "random", "--config_overrides", "{hybrid_override_pattern: M-*-}"],
    "elastic": ["--budgets", "{full: 1.0, half: 60%}"],
}
COMMANDS = {"sft": sft, "distill": distill, "elastic": elastic_train}


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    folder = tmp_path_factory.mktemp("box")
    write_parent(folder / "parent")
    for name, numbers in (("data", range(60)), ("held", range(60, 66))):
        lines = [json.dumps({"text": f"def f{number}(x):\n    return x + {number}\n"}) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def run(name, box, output_dir, *flags):
    model = ["--model", str(box / "parent")] if name == "elastic" else []
    return COMMANDS[name].main([
        "--data", str(box / "data.jsonl"), "--sequence_length", "64", "--per_device_train_batch_size", "2", "--use_cpu",
        "--max_steps", "2", "--logging_steps", "1", "--save_steps", "1", "--disable_tqdm", "true", "--report_to", "none",
        "--output_dir", str(output_dir), *model, *FLAGS[name], *flags,
    ])  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_data_seed_alone_says_the_order(name, box, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)

    def order(**seeds):
        training = NemotronHTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, sequence_length=64, max_steps=2, **seeds
        )
        rows, _ = ROWS[name](DataArguments(data=[str(box / "data.jsonl")]), training, tokenizer)
        return torch.stack([row["input_ids"] for row in rows])

    assert torch.equal(order(seed=1, data_seed=5), order(seed=5))
    assert not torch.equal(order(seed=1, data_seed=5), order(seed=1))


@pytest.mark.parametrize("name", COMMANDS)
def test_eval_steps_alone_evaluates(name, box, tmp_path):
    held_out = ["--eval_data", str(box / "held.jsonl")]
    calibrate = ["--calibrate", "false"] if name == "elastic" else []
    assert run(name, box, tmp_path, *held_out, "--eval_steps", "1", *calibrate) == 0
    steps = {row["step"] for row in read_metrics(tmp_path) if "eval_loss" in row or "eval_half_loss" in row}
    assert steps == ({1, 2} if name == "elastic" else {0, 1, 2})
    for steps, flags in (("1.5", held_out), ("0", held_out), ("1", [])):
        with pytest.raises(ValueError, match=f"eval_steps={float(steps)}: allowed is"):
            run(name, box, tmp_path / "x", "--eval_steps", steps, *flags)


@pytest.mark.parametrize("name, flags", [*((name, ()) for name in COMMANDS), ("sft", ("--lora_rank", "2"))])
def test_the_finished_model_is_pushed_once(name, flags, box, tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(hub, "upload", lambda *what: sent.append(what) or "the address")
    push = ("--push_to_hub", "true", "--hub_model_id", "owner/name", "--hub_private_repo", "true")
    assert run(name, box, tmp_path / "run", *push, *flags) == 0
    ((plan, repo_id, private),) = sent
    assert {"adapter_model.safetensors" if flags else "model.safetensors", "tokenizer.json", "README.md"} <= set(plan)
    assert (repo_id, private) == ("owner/name", True) and "the address" in capsys.readouterr().out
    with pytest.raises(ValueError, match="hub_model_id"):
        run(name, box, tmp_path / "other", "--push_to_hub", "true")


@pytest.mark.parametrize("command", ["sft", "distill", "elastic-train", "merge", "export", "plot", "blend"])
def test_help_teaches(command, capsys):
    """It has lines to copy, and all their options are among those that it explains."""
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text, explained = capsys.readouterr().out.split("\noptions:\n")
    lines = re.findall(rf"^    nemotron-h {command} (.+)$", text, re.MULTILINE)
    options = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", explained, re.MULTILINE))
    assert len(lines) >= 2
    for line in lines:
        used = re.findall(r"(?<!\S)--[\w-]+", line.split("  #")[0])
        assert set(used) <= options, line
