"""Tiny training runs: text files on disk, a blend of them, rows, a model of a few thousand weights, a trainer of seconds."""

import json
from pathlib import Path

import torch
from tiny import tiny_config

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.data.blend import Blend
from nemotron_h_hf.data.packing import SplitRows
from nemotron_h_hf.data.phases import phases_from
from nemotron_h_hf.data.sources import sources_from
from nemotron_h_hf.training.arguments import NemotronHTrainingArguments
from nemotron_h_hf.training.trainer import NemotronHTrainer

LENGTH = 32
ROWS_PER_STEP = 4
TOKENS_PER_STEP = ROWS_PER_STEP * LENGTH
STEPS = 8
TIMES = ("tokens_per_second", "mfu", "memory_bytes")


def write_texts(folder: Path) -> Path:
    """Two sources of short texts that differ in their letters."""
    for name, letters in (("low", "abcdefghij "), ("high", "klmnopqrst ")):
        (folder / name).mkdir(parents=True)
        generator = torch.Generator().manual_seed(len(name))
        for number in range(40):
            picks = torch.randint(len(letters), (10 + 7 * (number % 9),), generator=generator)
            (folder / name / f"{number:02}.txt").write_text("x" + "".join(letters[i] for i in picks))
    return folder


def make_rows(texts: Path, steps: int = STEPS) -> SplitRows:
    """Rows of a blend whose weights change in the middle of the run; a letter is a token."""
    sources = {name: {"path": str(texts / name / "*.txt")} for name in ("low", "high")}
    phases = [{"until": "50%", "weights": {"low": 3, "high": 1}}, {"weights": {"low": 1, "high": 3}}]
    blend = Blend(
        sources_from(sources),
        phases_from(phases),
        lambda text: [ord(c) % 90 + 3 for c in text],
        steps * TOKENS_PER_STEP,
    )
    return SplitRows(blend, LENGTH)


def make_arguments(output_dir: Path, **fields) -> NemotronHTrainingArguments:
    """Four rows per step, a line and a checkpoint every other step unless said otherwise."""
    settings = {
        "output_dir": str(output_dir), "use_cpu": True, "disable_tqdm": True, "sequence_length": LENGTH,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 4e-3,
        "warmup_tokens": "20%", "decay_tokens": "30%", "logging_steps": 1, "save_steps": 3,
    }  # fmt: skip
    return NemotronHTrainingArguments(**{**settings, **fields})


def fresh_model() -> NemotronHForCausalLM:
    """One layer of each dense kind, with the same weights every time."""
    torch.manual_seed(0)
    return NemotronHForCausalLM(tiny_config(hybrid_override_pattern="M-*"))


class RecordingTrainer(NemotronHTrainer):
    """Remembers the input ids of every batch."""

    def compute_loss(self, model, inputs, *others, **named):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].clone()]
        return super().compute_loss(model, inputs, *others, **named)


def make_trainer(
    texts: Path, output_dir: Path, steps: int = STEPS, callbacks: tuple = (), **fields
) -> RecordingTrainer:
    """A trainer of a fresh model that is the same every time."""
    model = fresh_model()
    arguments = make_arguments(output_dir, **{"max_steps": steps, **fields})
    return RecordingTrainer(model, arguments, train_dataset=make_rows(texts), callbacks=list(callbacks))


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
