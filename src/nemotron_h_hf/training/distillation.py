"""Distillation: its flags, and a trainer whose loss is the teacher's distribution, live from a model or from a cache on disk.

The teacher is not part of the trained model: it is never saved, has no gradient and stays in eval mode. Under FSDP2 it is
sharded too (`shard_teacher`), on the processes of the student. The student's loss is computed inside its own forward,
through `loss_from_hidden`, because only there a sharded lm_head has its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from ..errors import require
from .arguments import flag
from .losses import DistillationLoss, LiveTeacher, TopK, distillation_loss
from .one_copy import filled_after
from .teacher_cache import TeacherCache, teacher_hidden_states
from .trainer import NemotronHTrainer


@dataclass
class TeacherArguments:
    """Who teaches, and how; shared by distill and elastic-train."""

    _argument_group_name = "teacher"

    teacher: str | None = flag(
        None, "folder or hub id; default: the embedded model, in elastic-train a frozen copy of the parent"
    )
    temperature: float = flag(1.0, "T; above 1 the teacher's small probabilities weigh more")
    cross_entropy_weight: float = flag(0.0, "w from 0, the teacher alone, to 1, the data alone")

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        require(0 <= self.cross_entropy_weight <= 1, "cross_entropy_weight", self.cross_entropy_weight, "0 to 1")


@dataclass
class DistillationArguments(TeacherArguments):
    """As TeacherArguments, and the teacher's cache."""

    teacher_dtype: str = flag("auto", "of its weights; auto: as stored", choices=("auto", "float32", "bfloat16"))
    teacher_cache: str | None = flag(None, "folder made by --cache_teacher, read instead of running the teacher")
    cache_teacher: str | None = flag(None, "only run the teacher, and write its largest logits to this folder")
    top_k: int = flag(64, "logits per token that --cache_teacher keeps")
    whole_documents: bool = flag(False, "never cut a record at the end of a row")

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.cache_teacher is not None and self.teacher_cache is not None
        require(not both, "teacher_cache", self.teacher_cache, "either this, to train, or cache_teacher, to write")


class DistillationTrainer(NemotronHTrainer):
    """Trains on (1 - w) * T^2 * KL(teacher || student) + w * cross-entropy; logs both parts and their sum.

    Args:
        teacher: a causal LM with the student's vocabulary, or a `TeacherCache` made at the same temperature.
        temperature: T.
        cross_entropy_weight: w; 0 is the teacher alone.
        All others: as NemotronHTrainer's; rows need `labels`, whose values count only with w > 0, and -100 always.

    Raises:
        ValueError: for a teacher of another vocabulary or temperature, or together with z_loss.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | TeacherCache,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        **named: Any,
    ):
        super().__init__(*args, **named)
        if self.args.z_loss:
            raise ValueError(f"z_loss={self.args.z_loss}: allowed in distillation is 0")
        check_teacher(teacher, self.model, temperature)
        self.teacher = teacher
        self.temperature, self.cross_entropy_weight = temperature, cross_entropy_weight
        self._parts = torch.zeros(2, device=self.args.device)  # KL and cross-entropy since the last line of the log
        self._parts_since = 0
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
            if self.is_fsdp_enabled:
                shard_teacher(teacher)
            else:
                teacher.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None
    ) -> Any:
        """As transformers', with the distillation loss in place of the model's own, in evaluation too."""
        loss_from_hidden = partial(
            self._loss, labels=inputs["labels"], teacher=self._ask_teacher(inputs),
            num_items_in_batch=num_items_in_batch, train=model.training,
        )  # fmt: skip
        inputs = {**inputs, "loss_from_hidden": loss_from_hidden, "skip_logits": True}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As NemotronHTrainer's, with `kl` and `cross_entropy` in addition to a training loss."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - max(self._parts_since, self._first_step))
            parts = self.accelerator.reduce(self._parts.clone(), "sum") / steps
            if not self.args.average_tokens_across_devices:
                parts /= self.accelerator.num_processes
            logs |= dict(zip(("kl", "cross_entropy"), parts.tolist(), strict=True))
            self._parts.zero_()
            self._parts_since = self.state.global_step
        super().log(logs, start_time)

    def _ask_teacher(self, inputs: dict[str, Tensor]) -> LiveTeacher | TopK:
        input_ids, position_ids = inputs["input_ids"], inputs.get("position_ids")
        if isinstance(self.teacher, TeacherCache):
            return self.teacher.lookup(input_ids, position_ids)
        hidden_states = teacher_hidden_states(self.teacher, input_ids, position_ids, inputs.get("attention_mask"))
        return LiveTeacher(hidden_states, self.teacher.get_output_embeddings())

    def _loss(
        self,
        hidden_states: Tensor,
        lm_head: nn.Module,
        labels: Tensor,
        teacher: LiveTeacher | TopK,
        num_items_in_batch: Tensor | int | None,
        train: bool,
    ) -> Tensor:
        out = distillation_loss(
            hidden_states, lm_head, labels, self.model.config.vocab_size, teacher, self.temperature,
            self.cross_entropy_weight, num_items_in_batch,
        )  # fmt: skip
        self._keep(out, labels, num_items_in_batch, train)
        return out.loss

    def _keep(
        self, out: DistillationLoss, labels: Tensor, num_items_in_batch: Tensor | int | None, train: bool
    ) -> None:
        """Remember the parts of a micro-step's loss for the log; those of an evaluation are not."""
        if train:
            scale = 1 if num_items_in_batch is not None else 1 / self.current_gradient_accumulation_steps
            self._parts += scale * torch.stack([out.kl, out.cross_entropy]).to(self._parts)


def check_teacher(teacher: PreTrainedModel | TeacherCache, student: nn.Module, temperature: float) -> None:
    """`ValueError` unless teacher and student have the same tokens, and a cache the same temperature."""
    vocab_size = student.config.vocab_size
    if isinstance(teacher, TeacherCache):
        teacher.check(vocab_size=vocab_size, temperature=temperature)
    elif teacher.config.vocab_size != vocab_size:
        raise ValueError(
            f"teacher: its vocab_size is {teacher.config.vocab_size}, the student's {vocab_size}: allowed is the same"
        )


def shard_teacher(teacher: PreTrainedModel) -> None:
    """Spread a teacher's weights over all processes (FSDP2): blocks, then the rest of the stack, lm_head, mtp.

    lm_head is its own root because the loss calls it, outside the teacher's forward. It stays whole once it was
    gathered: it is needed for every chunk, and again in the student's backward. Multi-token prediction never runs.
    Only the first process need have the weights (one_copy.py).

    Raises:
        ValueError: if lm_head and embeddings are one weight.
    """
    if teacher.config.tie_word_embeddings:
        raise ValueError("teacher: tie_word_embeddings is true: allowed under FSDP is a teacher with its own lm_head")
    lm_head = teacher.get_output_embeddings()
    with filled_after(teacher):
        for layer in teacher.base_model.layers:
            fully_shard(layer)
        for part in teacher.children():
            fully_shard(part, reshard_after_forward=False if part is lm_head else None)
