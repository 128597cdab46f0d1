"""`nemotron-h pretrain` and `nemotron-h plot`: arguments, a tiny run from end to end, crashes, and several processes."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import tiny_model
from tiny_run import read_metrics
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL, NemotronHForCausalLM, hub
from nemotron_h_hf.data.blend import Blend
from nemotron_h_hf.data.packing import SplitRows
from nemotron_h_hf.data.phases import Phase
from nemotron_h_hf.data.sources import Source
from nemotron_h_hf.scripts import plot, pretrain
from nemotron_h_hf.training.arguments import NemotronHTrainingArguments, installed_report
from nemotron_h_hf.training.checkpoints import whole_checkpoints

ROOT = Path(__file__).parents[2]
MODEL = {
    "hybrid_override_pattern": "M-*", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
    "ssm_state_size": 8, "chunk_size": 8,
}  # fmt: skip


def write_config(folder: Path, texts: Path, **changes) -> Path:
    """run.yaml of 12 steps of 4 rows of 32 tokens, the blend changing after 600 tokens."""
    settings = {
        "output_dir": str(folder / "run"), "init": "random", "config_overrides": MODEL, "use_cpu": True,
        "total_tokens": 12 * 128, "sequence_length": 32, "per_device_train_batch_size": 4, "learning_rate": "4e-3",
        "warmup_tokens": 256, "logging_steps": 1, "save_steps": 4, "disable_tqdm": True,
        "sources": {name: {"path": str(texts / name)} for name in ("low", "high")},
        "phases": [{"until": 600, "weights": {"low": 1}}, {"weights": {"low": 1, "high": 2}}],
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


# Arguments


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        pretrain.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for words in ("nemotron-h pretrain --config run.yaml", "accelerate launch -m", "--sources", "--total_tokens",
                  "--optimizer {adamw,muon}", "until: 60%", "checkpoint folder, hub id"):  # fmt: skip
        assert words in shown, words
    assert "--hub_token" not in shown
    with pytest.raises(SystemExit):
        pretrain.main(["--help_all"])
    assert "--hub_token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "unknown option --lerning_rate; did you mean 'learning_rate'"),
        (["--learning-rate", "fast"], "--learning_rate.*invalid float value: 'fast'"),
        (["--optimizer", "sgd"], "--optimizer: invalid choice: 'sgd'"),
        (["--total_tokens", "3X"], "total_tokens='3X': allowed is a number of tokens such as"),
        (["--total_tokens", "9"], "total_tokens='9': allowed is a step's 4096 or more"),
        (["--min_lr_ratio", "2"], "min_lr_ratio=2.0: allowed is 0 to 1"),
        (["--z_loss=-1"], "z_loss=-1.0: allowed is 0"),
        (["--router_aux_loss_coef=-1"], "router_aux_loss_coef=-1.0: allowed is 0"),
        (
            ["--lr_scheduler_type", "cosine", "--decay_tokens", "1M"],
            "decay_tokens='1M': allowed is .*not with cosine",
        ),
        (
            ["--lr_scheduler_type", "linear", "--min_lr_ratio", "0.1"],
            "min_lr_ratio=0.1: allowed is .*not with linear",
        ),
        (
            ["--lr_scheduler_type", "cosine", "--decay_shape", "cosine"],
            "decay_shape='cosine': allowed is with .*wsd",
        ),
        (["--warmup_steps", "5"], "warmup_steps=5.0: allowed is none with wsd; give --warmup_tokens"),
        (["--optim", "adamw_8bit"], "optim='adamw_8bit': allowed is .*choose by --optimizer"),
        (["--optim_args", "a=b"], "optim_args='a=b': allowed is none"),
        (["--auto_find_batch_size", "true"], "auto_find_batch_size=True: allowed is False"),
        (["--fp16", "true"], "fp16=True: allowed is False, or --bf16"),
        (
            ["--sources", "{a: {path: x}}", "--total_tokens", "1M", "--push_to_hub"],
            "hub_model_id=None: allowed is owner",
        ),
        (
            ["--sources", "{a: {path: x}}", "--total_tokens", "1M", "--eval_steps", "5"],
            "eval_steps=5.0?: allowed is none",
        ),
        (["--total_tokens", "1M"], "sources=None: allowed is a mapping"),
        (["--sources", "nothing"], "sources='nothing': allowed is a mapping or list"),
        (["--sources", "{a: {path: x}}"], "total_tokens=None: allowed is a number of tokens"),
        (["run.yaml"], "unexpected argument 'run.yaml'"),
    ],
)
def test_wrong_flags_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        pretrain.main([*argv, "--use_cpu"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"totl_tokens": 5}, "run.yaml has an unknown key 'totl_tokens'; did you mean 'total_tokens'"),
        ({"learning_rate": "quick"}, "invalid float value: 'quick'"),
        ({"shuffle_rows": -2}, "shuffle_rows=-2: allowed is 0 or more"),
        ({"sources": {"low": {"pth": "x"}}}, "source low has a key 'pth'; did you mean 'path'"),
        ({"phases": [{"weights": {"lo": 1}}]}, "'lo'; did you mean 'low'"),
        ({"config_overrides": {"hiden_size": 3}}, "config_overrides='hiden_size'.*did you mean 'hidden_size'"),
        ({"init": "weights"}, "config_overrides: allowed with --init random"),
        ({"tokenizer": "nowhere"}, "tokenizer: none found in 'nowhere'"),
        ({"model": "nowhere"}, "model='nowhere': allowed with --init random is .* preset .*nemotron-h-8b"),
        ({"model": "a/nowhere"}, "model='a/nowhere': allowed with --init random is a checkpoint folder"),
        (
            {"model": "nowhere", "init": "weights", "config_overrides": None},
            "model='nowhere': allowed is a checkpoint folder or a hub id",
        ),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1: allowed is for a model with experts"),
        ({"config_overrides": {**MODEL, "vocab_size": 99}}, "has 2048 tokens: allowed are the model's 99"),
    ],
)
def test_wrong_yaml_is_named(texts, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain.main(["--config", str(write_config(tmp_path, texts, **changes))])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_file_that_is_no_mapping(tmp_path):
    for text, message in (("- a\n", "holds a list: allowed is a mapping"), ("a: [", "is not YAML")):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            pretrain.main(["--config", str(tmp_path / "run.yaml")])


def test_launched_with_fp16_is_refused(tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision fp16` says so in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision='fp16': allowed is bf16 or no"):
        NemotronHTrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def test_total_tokens_become_steps(tmp_path):
    arguments = NemotronHTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, sequence_length=100, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, total_tokens="10K",
    )  # fmt: skip
    assert (arguments.tokens_per_step, arguments.max_steps) == (600, 16)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine with an accelerator pins memory")
def test_no_memory_is_pinned_where_there_is_nothing_to_copy_to(tmp_path):
    """torch warns of that at every data loader; without --use_cpu too."""
    arguments = NemotronHTrainingArguments(output_dir=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(DataLoader([1, 2], pin_memory=arguments.dataloader_pin_memory))) == 2


def test_encoder_opens_and_closes_documents():
    encode = pretrain.document_encoder(AutoTokenizer.from_pretrained(EMBEDDED_MODEL))
    ids = encode("def f():")
    assert ids[0] == ids[-1] == 0 and 0 not in ids[1:-1]
    with pytest.raises(ValueError, match="the document is a list: allowed are text and lists of token ids"):
        encode([{"role": "user"}])


def test_token_ids_are_taken_as_they_are(texts, tmp_path):
    """The same rows from texts and from a column of their tokens."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    encode = pretrain.document_encoder(tokenizer)
    files = sorted(Path(texts).rglob("*.txt"))
    lines = [path.read_text() for path in files]
    for column, values in (("text", lines), ("input_ids", [encode(line) for line in lines])):
        rows = "".join(json.dumps({column: value}) + "\n" for value in values)
        (tmp_path / f"{column}.jsonl").write_text(rows)
    blends = [
        Blend(
            [Source("data", path=str(tmp_path / f"{column}.jsonl"), column=column)], [Phase({"data": 1.0})], encode, 500
        )
        for column in ("text", "input_ids")
    ]
    ours, expected = (list(SplitRows(blend, 32)) for blend in blends)
    assert len(ours) > 10 and all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(ours, expected, strict=True)
    )
    with pytest.raises(ValueError, match=f"token ids from 3 to {len(tokenizer)}: allowed are 0 to"):
        encode([3, len(tokenizer)])


# A run


def test_metrics_go_to_tensorboard_where_it_is_installed(texts, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert (
        pretrain.main(["--config", str(write_config(tmp_path, texts)), "--max_steps", "5", "--total_tokens", "640"])
        == 0
    )
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in read_metrics(tmp_path / "run")]
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: SimpleNamespace(origin="file" if name == "trackio" else None)
    )
    assert installed_report() == ["trackio"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed_report() == ["none"]


def test_pretrain_from_end_to_end(texts, tmp_path, capsys):
    """Stopped by a smaller total, lengthened (the decay had not begun), and run once more when it is done."""
    config = write_config(tmp_path, texts, decay_tokens=0)
    assert pretrain.main(["--config", str(config), "--max_steps", "5", "--total_tokens", "640"]) == 0
    assert pretrain.main(["--config", str(config)]) == 0
    run = tmp_path / "run"
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    model = NemotronHForCausalLM.from_pretrained(run / "model")
    last = NemotronHForCausalLM.from_pretrained(run / "checkpoint-12")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), last.parameters()))
    assert model.config.use_cache and last.config.use_cache
    assert AutoTokenizer.from_pretrained(run / "model")("x")["input_ids"]
    shown = capsys.readouterr().err
    assert "12 steps of 128 tokens on 1 process;" in shown and "TFLOP/s here; MFU is a share of that" in shown
    assert pretrain.main(["--config", str(config)]) == 0
    assert read_metrics(run) == rows


def test_finished_model_is_pushed_once_and_no_checkpoint(texts, tmp_path, monkeypatch, capsys):
    sent = []

    def upload(plan, repo_id, private):
        sent.append((repo_id, private, plan["model.safetensors"]))
        return "an address"

    monkeypatch.setattr(hub, "upload", upload)
    flags = ["--push_to_hub", "--hub_model_id", "owner/name", "--hub_private_repo", "true", "--max_steps", "5"]
    assert pretrain.main(["--config", str(write_config(tmp_path, texts, total_tokens=640)), *flags]) == 0
    assert sent == [("owner/name", True, tmp_path / "run" / "model" / "model.safetensors")]
    assert capsys.readouterr().out == "an address\n"


def test_totals_of_what_was_left_out_are_told(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('no json\n{"text": "abc"}\n')
    changes = {"sources": {"low": {"path": str(tmp_path / "a.jsonl")}}, "phases": [{"weights": {"low": 1}}]}
    config = write_config(tmp_path, tmp_path, total_tokens=128, warmup_tokens=0, **changes)
    assert pretrain.main(["--config", str(config)]) == 0
    (told,) = [message for message in caplog.messages if "left out in all" in message]
    assert told.startswith("left out in all of source low: ") and told.endswith(" x malformed JSON")


@pytest.mark.parametrize("init", ["weights", "random"])
def test_budgets_of_a_parent_that_is_trained_as_a_whole(init, texts, tmp_path, caplog):
    """They stay with the weights that they name, as not trained; fresh weights have none."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.save_pretrained(tmp_path / "parent")
    parent = tiny_model(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1)
    budgets = {"all": {"trained": True}, "small": {"hidden_size": 32, "trained": True, "loss": 1.5}}
    parent.config.elastic = {"version": 1, "budgets": budgets}
    parent.save_pretrained(tmp_path / "parent")
    changes = {"model": str(tmp_path / "parent"), "init": init, "config_overrides": None, "warmup_tokens": 0}
    config = write_config(tmp_path, texts, total_tokens=128, phases=[{"weights": {"low": 1, "high": 1}}], **changes)
    assert pretrain.main(["--config", str(config)]) == 0
    trained = NemotronHForCausalLM.from_pretrained(tmp_path / "run" / "model").config
    if init == "random":
        assert trained.elastic is None
        return
    assert any("budgets small are kept as not trained" in message for message in caplog.messages)
    assert trained.elastic["budgets"] == {"all": {"trained": False}, "small": {"hidden_size": 32, "trained": False}}


# plot


def test_plot_of_our_runs_and_the_tiny_models(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    lines = [{"step": step, "tokens": 100 * step, "loss": 5.0 / step} for step in range(1, 9)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "a" / "metrics.jsonl").write_text(text + '{"step": 9, "lo')
    tiny = ROOT / "docs" / "results" / "tiny"
    runs = [str(tmp_path / "a"), f"other={tiny / 'nemotron-h.jsonl'}", str(tiny / "llama.jsonl")]
    assert plot.main([*runs, "--output", str(tmp_path / "new" / "loss.png"), "--window", "2"]) == 0
    shown = capsys.readouterr().out
    assert "a: loss 0.6696 at tokens 800 (mean of 2 lines)" in shown  # (5/8 + 5/7) / 2
    assert "other: loss" in shown and "llama: loss" in shown
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="there is no metrics.jsonl or log.jsonl"):
        plot.main([str(tmp_path)])
    (tmp_path / "x.jsonl").write_text('{"step": 1, "loss": 2}\n')
    with pytest.raises(ValueError, match="has no line with tokens and loss; it has loss, step"):
        plot.main([str(tmp_path / "x.jsonl")])
    with pytest.raises(ValueError, match="'x' is the name of"):
        plot.main([str(tmp_path / "x.jsonl"), str(tmp_path / "x.jsonl")])
    (tmp_path / "y.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="y.jsonl, line 1 is not JSON"):
        plot.main([str(tmp_path / "y.jsonl")])
    with pytest.raises(ValueError, match=r"--output=.*y.jsonl.: allowed is a name that ends in .png"):
        plot.main([str(tmp_path / "y.jsonl"), "--output", str(tmp_path / "y.jsonl")])
    with pytest.raises(ValueError, match="--window=0"):
        plot.main([str(tmp_path / "x.jsonl"), "--window", "0"])
    with pytest.raises(ValueError, match="--y: .*x.jsonl has nothing that matches kl; it has loss, step"):
        plot.main([str(tmp_path / "x.jsonl"), "--x", "step", "--y", "lo*,kl"])


# Crashes and several processes

COMMAND = [sys.executable, "-m", "nemotron_h_hf.scripts.pretrain"]
KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from nemotron_h_hf.scripts import pretrain
save = torch.save
def half(content, path, *others, **named):
    if "checkpoint-8" in str(path) and "optimizer" in str(path):
        with open(path, "wb") as file:
            file.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, path, *others, **named)
torch.save = half
pretrain.main(sys.argv[1:])
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_kill_in_the_middle_of_a_step(texts, tmp_path):
    # 80 rows at the cut, inside a window
    config = write_config(tmp_path, texts, total_tokens=60 * 128, save_steps=10, shuffle_rows=17)
    whole = subprocess.run([*COMMAND, "--config", config, "--output_dir", tmp_path / "whole"], env=environment())
    assert whole.returncode == 0
    process = subprocess.Popen([*COMMAND, "--config", config], env=environment())
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 23):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert whole_checkpoints(tmp_path / "run")[-1].name == "checkpoint-20"
    assert subprocess.run([*COMMAND, "--config", config], env=environment()).returncode == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_kill_in_the_middle_of_a_checkpoint_write(texts, tmp_path):
    config = write_config(tmp_path, texts, save_total_limit=1)
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, "--config", config], env=environment())
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert (run / "checkpoint-8" / "optimizer.pt").read_bytes() == b"half"
    assert [folder.name for folder in whole_checkpoints(run)] == ["checkpoint-4"]
    for output_dir in (run, tmp_path / "whole"):
        command = [*COMMAND, "--config", config, "--output_dir", output_dir]
        assert subprocess.run(command, env=environment()).returncode == 0
    assert_same_runs(tmp_path / "whole", run)


@pytest.mark.slow
def test_two_processes_see_the_rows_of_one(texts, tmp_path):
    """Four rows a step on one process, two on each of two; then a run on two is resumed on one, and the reverse."""
    config = write_config(tmp_path, texts, shuffle_rows=6)
    launch(config, tmp_path / "one", processes=1)
    launch(config, tmp_path / "two", processes=2)
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    for before, after in ((2, 1), (1, 2)):
        output_dir = tmp_path / f"from_{before}"
        launch(config, output_dir, processes=before, total_tokens=8 * 128, decay_tokens=0)
        launch(config, output_dir, processes=after)
        rows = read_metrics(output_dir)
        assert [row["step"] for row in rows] == list(range(1, 13))
    expected = [row["loss"] for row in read_metrics(tmp_path / "from_1")]
    assert [row["loss"] for row in read_metrics(tmp_path / "from_2")] == pytest.approx(expected, abs=2e-3)


def launch(config: Path, output_dir: Path, processes: int, **flags) -> None:
    """Four rows a step in total, on this many processes (accelerate calls several `multi_gpu` on a CPU too: gloo joins them)."""
    flags = {"output_dir": output_dir, "per_device_train_batch_size": 4 // processes, **flags}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               "-m", "nemotron_h_hf.scripts.pretrain"] if processes > 1 else COMMAND  # fmt: skip
    words = [f"--{name}={value}" for name, value in {"config": config, **flags}.items()]
    done = subprocess.run([*command, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_runs(left: Path, right: Path) -> None:
    assert read_metrics(left) == read_metrics(right)
    models = [NemotronHForCausalLM.from_pretrained(run / "model").state_dict() for run in (left, right)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def assert_close_runs(left: Path, right: Path) -> None:
    for name in ("step", "tokens", "loss", "learning_rate", "grad_norm"):
        values = [[row[name] for row in read_metrics(run)] for run in (left, right)]
        assert values[0] == pytest.approx(values[1], rel=2e-3), name
