"""NemotronHTrainer: transformers.Trainer with our optimizers, schedule by tokens, exact resume and safe checkpoints.

What it adds to transformers.Trainer, which does all the rest:

    optimizer and schedule    AdamW in the paper's groups or Muon, warm-up-stable-decay by tokens; flags win on resume
    rows with a state         data/packing.py: every process reads the same rows and takes its own; the state is saved with
                              each checkpoint and restored, so nothing is read twice and nothing is skipped
    checkpoints               whole or ignored (checkpoints.py): a crash or a full disk at any moment loses nothing
    divergence                a loss or gradient that is no number, or a jump of the loss, stops before the weights change
    held-out loss             the mean over all tokens that count, at any batch size and number of processes
    further losses            z-loss, the experts' balance loss, multi-token prediction; in training alone, the latter two logged
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, ProgressCallback, Trainer, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, align_special_tokens
from transformers.utils import logging

from ..errors import require
from ..inputs import read_json
from ..units import parse_tokens
from ..whole_files import write_json
from . import checkpoints
from .arguments import NemotronHTrainingArguments
from .fp8 import refuse_double_conversion
from .monitor import Monitor
from .one_copy import let_accelerate_fill
from .optimizer import make_optimizer
from .schedule import Schedule, scheduler
from .z_loss import next_token_loss_with_z

logger = logging.get_logger(__name__)

DATA_STATE_FILE = "data_state.json"
STATES_KEPT = 8  # steps; a data loader reads one batch ahead
STEPS_REMEMBERED = 100  # whose mean a jump of the loss is measured from
IGNORE = -100


class TrainingStopped(ValueError):
    """The run cannot continue as it is; what was trained so far is safe."""


@runtime_checkable
class RowsWithState(Protocol):
    """Training rows that know where they stand, such as those of data/packing.py; rows are counted from the beginning of the run."""

    rows_yielded: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...
    def state_after(self, num_rows: int) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class EndlessRows(IterableDataset):
    """Rows round after round, until a round has none; a batch may so begin in one round and end in the next.

    Data loaders read ahead, so the state after each step's rows is kept here until the step is done.
    """

    def __init__(self, rows: RowsWithState, rows_per_step: int):
        self.rows, self.rows_per_step = rows, rows_per_step
        self.states: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, before = self.rows.rows_yielded, -1
        while self.rows.rows_yielded != before:
            before = self.rows.rows_yielded
            for row in self.rows:
                count = self.rows.rows_yielded
                if (count - first) % self.rows_per_step == 0:
                    self.states[count] = self.rows.state_after(count)
                    self.states = dict(list(self.states.items())[-STATES_KEPT:])
                yield row


class NemotronHTrainer(Trainer):
    """transformers.Trainer for a Nemotron-H model.

    Args:
        model, args, and all others: as transformers.Trainer's, with `args` of `NemotronHTrainingArguments`.
        train_dataset: rows with a state (see `RowsWithState`), or anything that transformers.Trainer takes.
        flops_per_token: of forward and backward together, for the MFU; None leaves it out.

    Raises:
        ValueError: for a model in FP8 that Accelerate would convert once more, data loader workers with such rows, or
            a balance loss without experts.
    """

    def __init__(
        self,
        model: nn.Module,
        args: NemotronHTrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        *others: Any,
        flops_per_token: float | None = None,
        **named: Any,
    ):
        self.rows = train_dataset if isinstance(train_dataset, RowsWithState) else None
        if self.rows is not None:
            train_dataset = EndlessRows(self.rows, args.tokens_per_step // args.sequence_length)
            data_collator = data_collator or default_data_collator
            args.accelerator_config.dispatch_batches = False  # every process reads all rows and takes its own
            args.ignore_data_skip = True
            if args.dataloader_num_workers:
                raise ValueError(
                    f"dataloader_num_workers={args.dataloader_num_workers}: allowed is 0, the rows' state is here"
                )
        _settle_mtp(model, args)
        use_cache = model.config.use_cache
        super().__init__(model, args, data_collator, train_dataset, *others, **named)
        self.model.config.use_cache = (
            use_cache  # transformers puts args.use_cache there, and would save it with the model
        )
        refuse_double_conversion(self.model, self.accelerator)
        if (coefficient := args.router_aux_loss_coef) is not None:
            has_experts = "moe" in self.model.config.get_text_config().layers_block_type
            require(has_experts, "router_aux_loss_coef", coefficient, "for a model with experts; this one has none")
            self.model.config.get_text_config().router_aux_loss_coef = coefficient
        let_accelerate_fill(self.model)
        self.pop_callback(ProgressCallback)
        self.pop_callback(PrinterCallback)
        self.monitor = Monitor(flops_per_token, show_bar=not args.disable_tqdm)
        self.add_callback(self.monitor)
        self._loss_of_step = torch.zeros((), device=args.device)
        # Means since the last line of the log: sum, count
        self._means = {name: torch.zeros(2, device=args.device) for name in ("balance_loss", "mtp_loss")}
        self._recent_losses: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._evaluated: list[Tensor] = []  # of each batch, the sum of its loss and the number of its items
        self._first_step = self._first_row = 0  # where this process began

    # Running and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **named: Any) -> Any:
        """As transformers', from a whole checkpoint only; True takes the last one, if there is any.

        When that is the end of the run already, its weights are loaded and nothing is trained.

        Raises:
            TrainingStopped: when the loss is no number or jumps.
            ValueError: for a checkpoint that is not whole, or of another batch size.
            BlockingIOError: when another run is writing to the same folder.
        """
        with checkpoints.writing_run(self.args):
            return self._train(resume_from_checkpoint, **named)

    def _train(self, resume_from_checkpoint: str | bool | None, **named: Any) -> Any:
        output_dir = Path(self.args.output_dir)
        if self.is_world_process_zero():
            checkpoints.discard_unfinished(output_dir)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = next(reversed(checkpoints.whole_checkpoints(output_dir)), None)  # checked below
        if resume_from_checkpoint:
            self._prepare_resume(Path(resume_from_checkpoint))
            if 0 < self.args.max_steps <= self._first_step:
                logger.warning(f"{resume_from_checkpoint} is at step {self._first_step} of {self.args.max_steps}: done")
                if not self.is_fsdp_enabled:
                    self._load_from_checkpoint(str(resume_from_checkpoint))
                if self.processing_class is not None:
                    align_special_tokens(self.model, self.processing_class)  # as training would have
                return TrainOutput(self._first_step, float("nan"), {})
        try:
            return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, **named)
        finally:
            self.monitor.close()

    def _prepare_resume(self, folder: Path) -> None:
        marker = checkpoints.check_whole(folder, contents=self.is_world_process_zero())
        if marker["tokens_per_step"] != self.args.tokens_per_step:
            raise ValueError(
                f"tokens per step={self.args.tokens_per_step:,}: allowed is what {folder} was trained with, "
                f"{marker['tokens_per_step']:,} (per_device_train_batch_size x gradient_accumulation_steps x processes x "
                "sequence_length)"
            )
        self._first_step = marker["step"]
        history = read_json(folder / TRAINER_STATE_NAME)["log_history"]
        lines = [line for line in history if line.get("loss") and line["step"] > self._first_step - STEPS_REMEMBERED]
        self._recent_losses.extend(line["loss"] for line in lines)
        if self.rows is not None:
            self.rows.load_state_dict(read_json(folder / DATA_STATE_FILE))
            self._first_row = self.rows.rows_yielded

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers'; then the settings of this run replace those of the checkpoint."""
        settings = [{name: v for name, v in group.items() if name != "params"} for group in self.optimizer.param_groups]
        peaks = list(self.lr_scheduler.base_lrs)
        with _naming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return
        self.lr_scheduler.base_lrs = peaks
        for group, setting, peak, factor in zip(
            self.optimizer.param_groups, settings, peaks, self.lr_scheduler.lr_lambdas, strict=True
        ):
            group.update(setting)
            group["lr"] = peak * factor(self.lr_scheduler.last_epoch)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _naming(checkpoint):
            super()._load_rng_state(checkpoint)

    # Optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or Muon by `args.optimizer`, unless one was handed in."""
        if self.optimizer is None:
            args = self.args
            self.optimizer = make_optimizer(
                self.model if model is None else model, args.optimizer, args.learning_rate, args.weight_decay,
                (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
            )  # fmt: skip
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Warm-up-stable-decay by tokens, or transformers' by another name of `lr_scheduler_type`, warmed up by tokens too."""
        args, total = self.args, num_training_steps * self.args.tokens_per_step
        if self.lr_scheduler is not None or args.warmup_tokens is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = parse_tokens(args.warmup_tokens, "warmup_tokens", total)
        if not args.uses_wsd:
            args.warmup_steps = round(Schedule(total, warmup, 0).warmup_tokens / args.tokens_per_step)
            return super().create_scheduler(num_training_steps, optimizer)
        decay = parse_tokens(args.decay_tokens, "decay_tokens", total)
        schedule = Schedule(total, warmup, decay, min_ratio=args.min_lr_ratio, shape=args.decay_shape)
        self.lr_scheduler = scheduler(optimizer or self.optimizer, schedule, args.tokens_per_step)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # A step

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As transformers'; rows that end before the run does are an error, half a step would go unnoticed."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rows is not None and len(batches) < num_batches:
            raise TrainingStopped(
                f"train_dataset: its rows end at step {self.state.global_step} of max_steps {self.state.max_steps}. "
                f"{self._what_is_safe()}"
            )
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None
    ) -> Any:
        """As transformers': the model's own loss; in training with the further losses that are asked for.

        In evaluation its sum is kept. Where the items are those of all processes, all of them add the same number of
        items, and each its loss times the number of processes: the quotient of the sums is the mean either way.
        """
        if self.args.z_loss and model.training and "labels" in inputs:
            loss_from_hidden = partial(
                next_token_loss_with_z, labels=inputs["labels"], vocab_size=self.model.config.get_text_config().vocab_size,
                z_weight=self.args.z_loss, num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
            inputs = {**inputs, "loss_from_hidden": loss_from_hidden}
        inputs = {**inputs, "use_cache": self.args.use_cache}
        if model.training and not return_outputs and self._can_skip_logits():  # no one reads them
            inputs = {"skip_logits": True, **inputs}
        if self.args.router_aux_loss_coef and model.training:
            inputs = {**inputs, "output_router_logits": True}
        if self.args.mtp_loss_weight and model.training:
            inputs |= {"mtp_loss_weight": self.args.mtp_loss_weight, "mtp_steps": self.args.mtp_steps}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name, output in (("balance_loss", "aux_loss"), ("mtp_loss", "mtp_loss")):
            if model.training and outputs.get(output) is not None:
                value = outputs[output].detach().to(self._means[name])
                self._means[name] += torch.stack([value, torch.ones_like(value)])
        if not model.training and num_items_in_batch is not None:
            items = torch.as_tensor(num_items_in_batch).to(loss.device, torch.float32)
            total = torch.where(items > 0, loss.detach().float().mean() * items, 0.0)
            self._evaluated.append(torch.stack([total, items]))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        """As transformers'; keeps the loss of the step for the check below."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_of_step += loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As transformers'; then the last moment to stop before the weights change, on all processes alike."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss = self.accelerator.reduce(self._loss_of_step.clone(), "mean").item()
        self._loss_of_step.zero_()
        norm = float(grad_norm) if grad_norm is not None else 0.0
        if not math.isfinite(loss) or not math.isfinite(norm):
            rate = self._get_learning_rate()
            self._stop(
                f"the loss is {loss} and the gradient norm {norm}",
                f"A lower learning_rate (now {rate:.3g}), or z_loss, may help; the same batch will come again.",
            )
        usual = sum(self._recent_losses) / max(len(self._recent_losses), 1)
        if self.args.max_loss_jump and self._recent_losses and loss > usual + self.args.max_loss_jump:
            jump = f"a jump of more than max_loss_jump={self.args.max_loss_jump}"
            self._stop(
                f"the loss is {loss:.4g} after a mean of {usual:.4g}, {jump}",
                "The same batch will come again: a higher max_loss_jump (0 turns it off) lets the run continue, from an earlier "
                "checkpoint (remove the later ones) a lower learning_rate may avoid the jump.",
            )
        if loss:  # a step of rows without a label has none
            self._recent_losses.append(loss)
        return grad_norm

    def _stop(self, reason: str, way_on: str) -> NoReturn:
        self._save_before_stop()
        raise TrainingStopped(
            f"step {self.state.global_step + 1}: {reason}; the weights were not changed. {self._what_is_safe()} {way_on}"
        )

    def _what_is_safe(self) -> str:
        whole = checkpoints.whole_checkpoints(self.args.output_dir)
        return f"The last whole checkpoint is {whole[-1]}." if whole else "There is no checkpoint yet."

    def _save_before_stop(self) -> None:
        """Keep the steps since the last checkpoint too, if the weights are still numbers; older ones all stay."""
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        broken = sum(~tensor.detach().isfinite().all() for tensor in local).to(self.args.device, torch.float32)
        finite = self.accelerator.reduce(broken, "sum").item() == 0
        if self.state.global_step > self._first_step and self.args.save_strategy != "no" and finite:
            self.model.zero_grad()
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.args.save_total_limit = limit

    # Evaluating

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As transformers', with the loss per item over all batches and processes in place of the mean of batches' means."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated:
            total, items = self.accelerator.reduce(torch.stack(self._evaluated).sum(0), "sum").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / items if items else math.nan
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        """As transformers', without logits where the loss is all that is asked for."""
        inputs = self._without_repeated_rows(inputs)
        if prediction_loss_only and self._can_skip_logits():
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _can_skip_logits(self) -> bool:
        self._set_signature_columns_if_needed()
        return "skip_logits" in self._signature_columns

    def _without_repeated_rows(self, inputs: dict) -> dict:
        """No labels in the rows by which Accelerate fills up the last batches of several processes."""
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        if labels is None or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        first = self.accelerator.process_index * len(labels)
        labels = labels.clone()
        labels[max(0, state.remainder - first) :] = IGNORE
        return {**inputs, "labels": labels}

    # Logging and saving

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with tokens per second, MFU, memory and the parts of the loss in addition to a training loss."""
        if "loss" in logs:
            logs |= self.monitor.figures(self.args, self.state) | self._parts_of_loss()
        super().log(logs, start_time)

    def _parts_of_loss(self) -> dict[str, float]:
        """Means over the micro-steps of all processes since the last line, of the parts that the model was asked for."""
        found = {}
        for name, sums in self._means.items():
            total, count = self.accelerator.reduce(sums.clone(), "sum").tolist()
            sums.zero_()
            found |= {name: total / count} if count else {}
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', with the rows' state; the folder counts once everything in it is on the disk."""
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if (folder / checkpoints.MARKER).is_file():
            return
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # nothing goes before this one is whole
        try:
            if self.is_world_process_zero():
                checkpoints.require_space(output_dir, self._checkpoint_bytes())
                checkpoints.begin(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero() and not (folder / "config.json").is_file():  # of sharded weights
                self.model.config.save_pretrained(folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
            if self.is_world_process_zero() and self.rows is not None:
                write_json(folder / DATA_STATE_FILE, self.train_dataset.states[self._rows_consumed()])
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                step = self.state.global_step
                checkpoints.mark_whole(folder, {"step": step, "tokens_per_step": self.args.tokens_per_step})
        # torch and safetensors raise their own errors on a full disk
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.is_world_process_zero():
                checkpoints.discard_unfinished(output_dir)
            raise OSError(
                f"the checkpoint of step {self.state.global_step} could not be written: {error}. {self._what_is_safe()}"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.is_world_process_zero():
            checkpoints.discard_oldest(output_dir, limit, never=self.state.best_model_checkpoint)

    def _rows_consumed(self) -> int:
        """Rows in all whole steps of the run, including those that other processes took."""
        steps = self.state.global_step - self._first_step
        return self._first_row + steps * self.train_dataset.rows_per_step

    def _checkpoint_bytes(self) -> int:
        """Bytes of weights and optimizer states, all processes together where they are sharded."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _settle_mtp(model: nn.Module, args: NemotronHTrainingArguments) -> None:
    """Ask for the gradients that `mtp_loss_weight` and `mtp_freeze_trunk` need."""
    weight, config = args.mtp_loss_weight, model.config.get_text_config()
    if not weight:
        return
    require(config is model.config, "mtp_loss_weight", weight, "0 for a vision-language model")
    depth = config.num_nextn_predict_layers
    require(depth > 0, "mtp_loss_weight", weight, "0 for a model without multi-token prediction; --mtp_depth adds it")
    if args.mtp_freeze_trunk:
        model.requires_grad_(False)
    model.mtp.requires_grad_(True)


@contextmanager
def _naming(checkpoint: str | None) -> Iterator[None]:
    """What goes wrong with the states of optimizer, schedule and random numbers, with the folder that they are in."""
    try:
        yield
    except Exception as error:  # of torch, pickle and zip alike
        if checkpoint is None:
            raise
        raise ValueError(
            f"the states in {checkpoint} cannot be read ({type(error).__name__}: {error}); remove it to resume from the one "
            "before it"
        ) from error
