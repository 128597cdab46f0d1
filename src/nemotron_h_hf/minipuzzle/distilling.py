"""`nemotron-h distill` as a step of a stage: in this process, or started by a launcher."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import nemotron_h_cli

from ..compression.ranking import Tally, predict, targets_of
from ..elastic.prepare.measuring import batches_of
from ..errors import require
from ..inputs import read_json
from ..model.modeling_nemotron_h import NemotronHForCausalLM
from .run import Run


def distill(
    run: Run, model: Path, output: Path, total_tokens: int, seed: int, cache: Path | None = None
) -> dict[str, float]:
    """Train the model of a folder on what the teacher predicts, or go on with it; held-out losses before and after.

    The student is OUTPUT/model. Remove the checkpoints when the losses are kept: without both, all is trained again.
    """
    words = [*_words(run, total_tokens, seed), "--model", str(model), "--output_dir", str(output)]
    run.forget_image()
    command(run, [*words, *(["--teacher", str(run.teacher)] if cache is None else ["--teacher_cache", str(cache)])])
    return read_json(output / "held_out.json")


def remove_checkpoints(output: Path) -> None:
    """Of a training that is done; optimizer states are large."""
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)


def cache_teacher(run: Run, folder: Path, total_tokens: int, seed: int) -> None:
    """Write the teacher's largest logits for the rows of a `distill` with the same arguments, or go on with it."""
    run.forget_image()
    words = [*_words(run, total_tokens, seed), "--teacher", str(run.teacher), "--output_dir", str(folder.parent)]
    command(run, [*words, "--cache_teacher", str(folder), "--top_k", str(run.arguments.top_k)])


def command(run: Run, words: Sequence[str]) -> None:
    """Run it.

    Raises:
        ValueError: for options that it refuses, or a launcher that failed.
    """
    if run.arguments.launch is None:
        nemotron_h_cli.run(["distill", *words])
        return
    launcher = shlex.split(run.arguments.launch)
    status = subprocess.run([*launcher, "-m", "nemotron_h_hf.scripts.distill", *words]).returncode
    require(status == 0, "launch", run.arguments.launch, f"a command that trains; it ended with status {status}")


@torch.no_grad()
def held_out_figures(run: Run, model: NemotronHForCausalLM) -> dict[str, float]:
    """Next-token accuracy and loss on the rows that candidates were ranked on."""
    tally = Tally()
    for batch in batches_of(run.text.ranking_rows, run.arguments.batch_size):
        targets = targets_of(batch).to(model.device)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
        found = predict(model.lm_head, model.model(**inputs, use_cache=False).last_hidden_state, targets)
        tally.add(found, found, targets)
    result = tally.result()
    return {"accuracy": result["accuracy"], "loss": result["loss"]}


def load_student(run: Run, folder: Path) -> NemotronHForCausalLM:
    """A trained model, to measure."""
    return NemotronHForCausalLM.from_pretrained(folder).to(run.device).eval()


def _words(run: Run, total_tokens: int, seed: int) -> list[str]:
    arguments, files = run.arguments, run.text.files()
    words = [
        "--data",
        *files.data,
        "--eval_data",
        *files.eval_data,
        "--sequence_length",
        str(arguments.sequence_length),
    ]
    words += ["--total_tokens", str(total_tokens), "--seed", str(seed), "--tokenizer", str(run.teacher)]
    words += ["--use_cpu"] if run.device.type == "cpu" else []
    for name, value in arguments.distill.items():
        words += _flag(name, value)
    return words


def _flag(name: str, value: Any) -> list[str]:
    """A key of a YAML file as words of a command line."""
    if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, (dict, list)) else value}"]
