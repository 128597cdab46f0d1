"""The command line: its table, its help without torch, and every command of this file on the embedded model."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import nemotron_h_cli as cli
from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.checkpoint_summary import read_contents
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.model.weights import read_header
from nemotron_h_hf.scripts import demo, generate, info
from nemotron_h_hf.units import human_bytes, human_count

COMMAND = Path(sys.executable).with_name("nemotron-h")


def test_help_does_not_import_torch():
    """Through the installed entry point's own target, in a process that has imported nothing else."""
    (entry,) = [line for line in COMMAND.read_text().splitlines() if line.startswith("from ")]
    code = f"{entry}\nimport sys\nstatus = main(['--help'])\nassert 'torch' not in sys.modules\nsys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, _, help_line in cli.COMMANDS:
        assert name in done.stdout and help_line in done.stdout


def test_installed_command_answers():
    done = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: nemotron-h COMMAND")


def test_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["genrate"]) == 2
    assert "did you mean 'generate'?" in capsys.readouterr().err
    assert cli.main(["zzz"]) == 2
    assert "commands: demo, generate, serve, info" in capsys.readouterr().err


@pytest.mark.parametrize("name, module", [row[:2] for row in cli.COMMANDS])
def test_every_command_has_help(name, module, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([name, "--help"])
    assert done.value.code == 0
    assert f"nemotron-h {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [row[0] for row in cli.COMMANDS])
def test_errors_of_options_name_no_private_function(name, monkeypatch):
    """argparse says "invalid NAME value" with the name of an option's type, unless that says itself what is allowed."""
    parsers = []

    def keep(parser, *_args, **_more):
        parsers.append(parser)
        sys.exit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
    with pytest.raises(SystemExit):
        cli.main([name])
    (parser,) = parsers
    for action in parser._actions:
        if action.type is None:
            continue
        with contextlib.suppress(argparse.ArgumentTypeError):
            try:
                action.type("no such value")
            except (TypeError, ValueError):
                assert re.fullmatch(r"[A-Za-z]\w*", getattr(action.type, "__name__", "?")), action.option_strings


def test_errors_are_one_line(capsys):
    assert cli.main(["info", "no-such-model"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nemotron-h info: error: target='no-such-model'") and "nemotron-h-8b" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("message", ["adapters need peft: pip install 'nemotron-h-hf[peft]'", "libc10.so: cannot open"])
def test_missing_extras_are_one_line_and_broken_installations_are_not(message, capsys, monkeypatch):
    def fail(argv):
        raise ImportError(message)

    monkeypatch.setattr(info, "main", fail)
    if "pip install" in message:
        assert cli.main(["info"]) == 1
        assert capsys.readouterr().err == f"nemotron-h info: error: {message}\n"
    else:
        assert cli.main(["info"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("nemotron-h info: error: unexpected ImportError: libc10") and "--debug" in error
        with pytest.raises(ImportError, match="libc10"):
            cli.main(["info", "--debug"])


@pytest.mark.parametrize("argv", [["--help"], ["info"]])
def test_a_closed_pipe_is_silence(argv):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([COMMAND, *argv], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == cli.CLOSED_PIPE
    assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize(
    "argv, status, said",
    [
        (["generate", "--device", "tpu"], 1, "--device='tpu'"),
        (["generate", "--device", "cuda:77"], 1, "--device='cuda:77'"),
        (["generate", "--device", "meta"], 1, "--device='meta'"),
        (["generate", "--temperature", "nan"], 2, "'nan': allowed is a finite number"),
        (["generate", "--top-p", "inf"], 2, "'inf': allowed is a finite number"),
        (["generate", "--seed", "-1"], 1, "--seed=-1"),
        (["info", "--memory-gib", "nan"], 2, "'nan': allowed is a finite number"),
        (["sft", "--data", "{}/b.yaml", "--learning_rate", "nan"], 1, "learning_rate=nan"),
        (["convert", EMBEDDED_MODEL, "{}/o", "--max-shard-size", "inf"], 1, "max_shard_size='inf'"),
        (["elasticize", EMBEDDED_MODEL, "{}/e", "--budgets", "{}/b.yaml"], 1, "b.yaml is not YAML"),
        (["info", "{}/deep"], 1, "config.json is not readable JSON"),
        (["generate", "--model", "{}/deep"], 1, "config.json is not readable JSON"),
        (["generate", "--model", "{}/torn"], 1, "tokenizer of"),
    ],
)
def test_bad_input_is_one_line_and_no_traceback(argv, status, said, tmp_path, capsys):
    (tmp_path / "b.yaml").write_text("a: [1")
    for name in ("deep", "torn"):
        (tmp_path / name).mkdir()
        for file in Path(EMBEDDED_MODEL).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "deep" / "config.json").unlink()
    (tmp_path / "deep" / "config.json").write_text('{"a":' + "[" * 10**5 + "]" * 10**5 + "}")
    (tmp_path / "torn" / "tokenizer.json").unlink()
    (tmp_path / "torn" / "tokenizer.json").write_text('{"version"')
    try:
        found = cli.main([word.format(tmp_path) for word in argv])
    except SystemExit as done:
        found = done.code
    error = capsys.readouterr().err
    assert found == status, error
    assert said in error and "unexpected" not in error and "Traceback" not in error
    lines = error.splitlines()
    assert status == 2 or [line for line in lines if " error: " in line] == lines[-1:]


def test_info_of_a_preset(capsys):
    assert info.main(["nemotron-h-8b"]) == 0
    text = capsys.readouterr().out
    assert "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-" in text
    assert "8,100,852,736" in text and "16.0 KiB per token" in text and "96.0 MiB per sequence" in text
    assert "\033" not in text


def test_info_counts_active_parameters_of_experts(capsys):
    assert info.main(["nemotron-3-super", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert round(facts["num_active_parameters"] / 1e9, 2) == 12.77
    assert facts["mtp_pattern"] == "*E"


def test_info_memory_at_a_context(capsys):
    assert info.main(["nemotron-h-8b", "--json", "--context", "1000", "--memory-gib", "16"]) == 0
    facts = json.loads(capsys.readouterr().out)
    one = 1000 * facts["kv_bytes_per_token"] + facts["ssm_state_bytes"] + facts["conv_state_bytes"]
    assert facts["cache_bytes_at_context"] == one
    assert facts["sequences_that_fit"] == (16 * 2**30 - facts["weight_bytes"]) // one


def test_info_of_the_embedded_model(capsys):
    """Default target; the stored tensors, counted by loading them, are what the configuration asks for."""
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tensors = load_file(Path(EMBEDDED_MODEL) / "model.safetensors")
    assert facts["stored"]["num_tensors"] == len(tensors) == facts["num_checkpoint_tensors"]
    assert facts["stored"]["num_bytes"] == facts["weight_bytes"] == sum(t.nbytes for t in tensors.values())
    assert facts["num_parameters"] == sum(t.numel() for t in tensors.values())
    assert facts["problems"] == []


def test_pattern_is_coloured_on_a_terminal():
    assert info.draw_pattern("M*", colour=False) == "M*"
    coloured = info.draw_pattern("M*", colour=True)
    assert coloured.count("\033[0m") == 2 and coloured.replace("\033[0m", "") != "M*"


def test_info_names_missing_and_truncated_shards(tmp_path, capsys):
    folder = sharded_copy(tmp_path / "model")
    (folder / "model-00001-of-00003.safetensors").unlink()
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert info.main([str(folder)]) == 1
    errors = capsys.readouterr().err
    assert "model-00001-of-00003.safetensors is missing" in errors
    assert "model-00002-of-00003.safetensors is cut short" in errors
    assert "00003-of" not in errors


def test_info_names_tensors_that_do_not_fit_the_configuration(tmp_path, capsys):
    folder = sharded_copy(tmp_path / "model")
    assert info.main([str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert info.main([str(folder)]) == 1
    errors = capsys.readouterr().err
    assert "backbone.embeddings.weight: config.json asks for shape" in errors


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"text, not tensors"]
)
def test_header_of_a_file_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors"):
        read_header(tmp_path / "model.safetensors")
    assert list(read_contents(tmp_path).damaged_files) == ["model.safetensors"]


def test_index_may_not_leave_the_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="plain file name"):
        read_contents(tmp_path)


def test_generate_streams_the_embedded_model(capsys):
    argv = ["--prompt", "import os\n", "--max-new-tokens", "6", "--seed", "1"]
    assert generate.main(argv) == 0
    first = capsys.readouterr()
    assert first.out.startswith("import os\n") and len(first.out) > len("import os\n\n")
    assert "tokens/s" in first.err
    generate.main(argv)
    assert capsys.readouterr().out == first.out


@pytest.mark.parametrize("option", [["--cache", "static"], ["--prompt-lookup", "3"]])
def test_generate_options_do_not_change_greedy_text(option, capsys):
    argv = ["--prompt", "import os\nimport os\n", "--max-new-tokens", "8", "--temperature", "0"]
    generate.main(argv)
    plain = capsys.readouterr().out
    generate.main([*argv, *option])
    assert capsys.readouterr().out == plain


def test_generate_reads_one_budget(tokenizer, tmp_path, capsys):
    """It writes what the cut-out model writes, and a name that the parent does not have is one line."""
    tokenizer.save_pretrained(tmp_path)
    parent = tiny_model(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1)
    parent.config.elastic = {"version": 1, "budgets": {"small": {"hidden_size": 32, "mamba_num_heads": 4}}}
    parent.save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--prompt", "import os", "--max-new-tokens", "6", "--temperature", "0"]
    texts = {}
    for budget in ([], ["--budget", "small"]):
        assert cli.main(["generate", *argv, *budget]) == 0
        texts[bool(budget)] = capsys.readouterr().out
    small = AutoModelForCausalLM.from_pretrained(tmp_path, budget="small")
    expected = small.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert (
        texts[True].strip() == tokenizer.decode(expected[0], skip_special_tokens=True).strip() != texts[False].strip()
    )
    assert cli.main(["generate", *argv, "--budget", "smal"]) == 1
    assert "'smal'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0"),
        (["--temperature", "-1"], "--temperature=-1.0"),
        (["--top-p", "0"], "--top-p=0.0"),
        (["--prompt-lookup", "2", "--cache", "static"], "--prompt-lookup needs --cache dynamic"),
        (["--num-mtp-tokens", "2"], "num_mtp_tokens=2: allowed is None, the model has no multi-token prediction"),
    ],
)
def test_generate_names_bad_options(argv, name, capsys):
    assert cli.main(["generate", *argv]) == 1
    assert f"nemotron-h generate: error: {name}" in capsys.readouterr().err


def test_demo_prints_text_memory_and_next_steps(capsys, monkeypatch):
    monkeypatch.setattr(demo, "CONTEXTS", (64, 256))
    monkeypatch.setattr(demo, "TIMED_TOKENS", 8)
    assert demo.main(["--max-new-tokens", "4"]) == 0
    text = capsys.readouterr().out
    assert "def read_lines(path):" in text and "What to try next" in text
    assert "       64  " in text and "      256  " in text
    rows = re.findall(r"^  (full|three_quarters|half) +([\d.]+ M) +([\d.]+ MiB) +([\d,]+)", text, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["full", "three_quarters", "half"]
    config = AutoConfig.from_pretrained(EMBEDDED_MODEL)
    counts = [num_parameters(resolve(config, name).config) for name, *_ in rows]
    assert [row[1:3] for row in rows] == [(human_count(count), human_bytes(2 * count)) for count in counts]
    assert all(float(speed.replace(",", "")) > 0 for *_, speed in rows)


def sharded_copy(folder: Path) -> Path:
    """The embedded model in three shards."""
    folder.mkdir()
    tensors = load_file(Path(EMBEDDED_MODEL) / "model.safetensors")
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = dict(list(tensors.items())[number::3])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text((Path(EMBEDDED_MODEL) / "config.json").read_text())
    return folder


@pytest.mark.parametrize("name", ["/no/such/model", "./models/none", "a/b/c"])
def test_a_folder_that_is_not_there_is_said_to_be_none(name, tmp_path, capsys):
    for words in (
        ["generate", "--model", name, "--prompt", "x"],
        ["slice", name, str(tmp_path / "out"), "--budget", "half"],
        ["make-vl", "--language-model", name, "--vision-model", "preset:internvit-300m", str(tmp_path / "vl")],
        ["minipuzzle", name, str(tmp_path / "work"), "--data", str(tmp_path / "x.jsonl"), "--max_parameters", "1M"],
    ):
        assert cli.main(words) == 1
        assert f"{name}" in (said := capsys.readouterr().err) and "no" in said
        assert "no such folder, and no hub id" in said or "is no folder here" in said, words


def test_a_teacher_that_is_neither_folder_nor_on_the_hub(tmp_path, capsys):
    """A name that could be a hub id."""
    words = ["minipuzzle", "runs/teacher", str(tmp_path / "work"), "--data", str(tmp_path / "x.jsonl")]
    assert cli.main([*words, "--max_parameters", "1M"]) == 1
    assert "runs/teacher is no folder here, and as a hub id it cannot be downloaded" in capsys.readouterr().err
