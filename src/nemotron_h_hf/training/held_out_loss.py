"""The held-out loss of a run: when it is measured, told and kept."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..errors import require
from ..inputs import read_json
from ..whole_files import write_json
from .arguments import NemotronHTrainingArguments
from .checkpoints import last_whole_checkpoint
from .data_arguments import DataArguments
from .trainer import NemotronHTrainer


def evaluate_every(data: DataArguments, training: NemotronHTrainingArguments) -> None:
    """Make --eval_steps N alone evaluate every N steps.

    Raises:
        ValueError: where there is nothing to evaluate, or N is no number of steps.
    """
    steps = training.eval_steps
    if steps is None:
        return
    require(bool(data.eval_data), "eval_steps", steps, "none without --eval_data")
    whole = steps >= 1 and steps == int(steps)
    require(whole or 0 < steps < 1, "eval_steps", steps, "a whole number of steps, or a share of the run below 1")
    if training.eval_strategy == IntervalStrategy.NO:
        training.eval_strategy, training.do_eval = IntervalStrategy.STEPS, True


def tell_before(trainer: NemotronHTrainer) -> None:
    """With held-out rows, report their loss when a run begins; for a resumed one it is known."""
    if trainer.eval_dataset and last_whole_checkpoint(trainer.args.output_dir) is None:
        trainer.add_callback(TellBefore(trainer))


class TellBefore(TrainerCallback):
    """Evaluates when training begins: under FSDP2 a model is ready only once it has been prepared with its optimizer."""

    def __init__(self, trainer: NemotronHTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        tell_held_out(self.trainer, "before")


def tell_held_out(trainer: NemotronHTrainer, when: str) -> None:
    """Evaluate, print, and keep the loss in OUTPUT_DIR/held_out.json, added to what is there; nothing without rows."""
    if not trainer.eval_dataset:
        return
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir, "held_out.json")
        losses = read_json(path) if path.is_file() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, losses | {when: loss})
        print(f"held-out loss {when}: {loss:.4f}", file=sys.stderr)
