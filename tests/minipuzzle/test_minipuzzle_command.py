"""`nemotron-h minipuzzle` from scores to a student on a tiny model: its files, its students, resuming, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_cli import run as command
from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, NemotronHElasticForCausalLM
from nemotron_h_hf.cost import num_parameters
from nemotron_h_hf.manifest import NAME as MANIFEST
from nemotron_h_hf.manifest import check_manifest
from nemotron_h_hf.minipuzzle import distilling, ranking, scoring, tournament
from nemotron_h_hf.minipuzzle.benchmarks import differing, distance
from nemotron_h_hf.minipuzzle.searching import seconds_of_table
from nemotron_h_hf.minipuzzle.stage_files import Stage
from nemotron_h_hf.model.loading import weight_files

SMALL = {
    "sequence_length": 32, "width_samples": 6, "layer_samples": 4, "ranking_tokens": 128, "batch_size": 2,
    "sizes": {"intermediate_size": [40, 80]}, "controls": 1, "finalists": 2, "min_distance": 1, "short_tokens": 128,
    "distill": {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True},
    "device": "cpu", "mixed_widths": True, "more_scores": ["cosine", "logits"],
}  # fmt: skip


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A teacher, and a text."""
    box, tokenizer = tmp_path_factory.mktemp("box"), AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = tiny_model("dense", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1)
    model.save_pretrained(box / "teacher")
    tokenizer.save_pretrained(box / "teacher")
    lines = [{"text": f"def f{n}(x):\n    return x + {n} * {n % 7}\n"} for n in range(80)]
    (box / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    most = 0.9 * num_parameters(model.config)
    recipe = {**SMALL, "data": [str(box / "text.jsonl")], "teacher": str(box / "teacher"), "max_parameters": str(int(most))}
    (box / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return box


def run(box: Path, work: Path, *words: str) -> int:
    return command(["minipuzzle", "--config", str(box / "recipe.yaml"), "--work", str(work), *words])


@pytest.fixture(scope="module")
def made(box) -> Path:
    """Everything, once."""
    output = ["--output", str(box / "student"), "--family", str(box / "family"), "--long_tokens", "128"]
    assert run(box, box / "work", *output, "--tasks", "test_minipuzzle_command:score_by_parameters") == 0
    return box


def score_by_parameters(model, tokenizer) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def read(made: Path, name: str) -> dict:
    return json.loads((made / "work" / f"{name}.json").read_text())


def test_it_runs(made):
    assert read(made, "student")
