"""ElasticTrainer: a parent and the models nested in it, trained together by distillation from a frozen teacher.

Each micro-step draws a budget; the router chooses its sizes, the parent runs with the masks of that choice, and

    loss = (1 - w) T^2 KL(teacher || masked parent) + w cross-entropy + a * router's loss (expected_cost.py)

reaches both weights and router (Nemotron Elastic, arXiv 2511.16664, eq. 14 and 17). Where the sizes are known (`Route.fixed`)
the masks are theirs, and there is no router. The router has its own learning
rate, a warm-up in steps and no weight decay. The rate decays with the model's, and the router's gradient is clipped
separately (grad_norm is that of the weights). No random number depends on the process.

metrics.jsonl gets, for a budget called 6b: loss_6b, kl_6b, cross_entropy_6b, router_loss_6b (means since the last line);
from a router also size_6b (expected, as a share of the parent) next to target_6b, and choice_6b_FIELD (the most likely size,
mean over layers).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ...errors import require
from ...inputs import open_tensors
from ...model.loss import IGNORE, share_of_items
from ...training.arguments import NemotronHTrainingArguments
from ...training.distillation import DistillationTrainer
from ...training.losses import DistillationLoss, LiveTeacher, TopK
from ...training.schedule import Schedule
from ...training.teacher_cache import teacher_hidden_states
from ...units import parse_tokens
from ...whole_files import whole_file
from ..child import Child
from .choices import DEPTH
from .curriculum import Stage, draw, shorter, stage_at
from .routed_model import ROUTER, Route, RoutedModel

ROUTER_FILE = "router.safetensors"
SUMS = ("kl", "cross_entropy", "items", "router_loss", "micro_steps")  # of each budget since the last line of the log


class ElasticTrainer(DistillationTrainer):
    """Trains weights and router; budgets are `route.targets`.

    Args:
        model: the parent, whose weights are ordered (elasticize); it gets the router and masks here.
        route: axes, cost, targets.
        stages: how often each budget is drawn, and how long sequences are.
        router_learning_rate, router_warmup_steps: the router's own.
        sandwich: the largest and the smallest budget in every step (`draw`).
        live_teacher: the smaller budgets learn from the parent as it is, which alone learns from the teacher.
        router_loss_weight: a. The distillation loss pulls sizes up; where it pulls harder than this, budgets stay too large.
        All others: as DistillationTrainer's; the teacher is another model than the parent, or a copy of it.

    Raises:
        ValueError: for a router with Muon, which has no second learning rate, a run without max_steps, or the model as its own teacher.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: NemotronHTrainingArguments,
        *others: Any,
        route: Route,
        stages: Sequence[Stage],
        router_learning_rate: float = 1e-2,
        router_warmup_steps: int = 60,
        router_loss_weight: float = 10.0,
        sandwich: bool = False,
        live_teacher: bool = False,
        **named: Any,
    ):
        if named.get("teacher") is model:
            raise ValueError("teacher=the model itself: allowed is a copy of it or another model, it stays frozen")
        with torch.random.fork_rng():  # the same router on every process, and nothing else drawn differently for it
            torch.manual_seed(args.seed)
            self.routed = RoutedModel(model, route)
        super().__init__(model, args, *others, **named)
        has_one_rate = route.fixed or self.args.optimizer == "adamw"
        require(bool(has_one_rate), "optimizer", self.args.optimizer, "adamw with a router, which has its own rate")
        coefficient = self.args.router_aux_loss_coef
        require(
            not coefficient, "router_aux_loss_coef", coefficient, "none in elastic training: it counts masked experts"
        )
        require(self.args.max_steps > 0, "max_steps", self.args.max_steps, "1 or more, or total_tokens")
        require(router_warmup_steps >= 0, "router_warmup_steps", router_warmup_steps, "0 or more")
        require(router_learning_rate > 0, "router_learning_rate", router_learning_rate, "a number above 0")
        require(router_loss_weight > 0, "router_loss_weight", router_loss_weight, "a number above 0")
        micro_steps = self.args.gradient_accumulation_steps
        require(
            not sandwich or micro_steps >= 2,
            "gradient_accumulation_steps",
            micro_steps,
            "2 or more with sandwich: one for each size",
        )
        require(not (live_teacher and self.is_fsdp_enabled), "live_teacher", live_teacher, "False under FSDP")
        self.sandwich, self.live_teacher = sandwich, live_teacher
        self.route, self.stages, self.names = route, tuple(stages), tuple(route.targets)
        self.router_learning_rate, self.router_warmup_steps = router_learning_rate, router_warmup_steps
        self.router_loss_weight = router_loss_weight
        self._micro_step = self._drawn = 0
        self._sums = torch.zeros(len(self.names), len(SUMS), dtype=torch.float64, device=args.device)
        self._held_out = torch.zeros(3, dtype=torch.float64, device=args.device)  # KL, cross-entropy, items

    @property
    def progress(self) -> float:
        """0 in the first step, 1 in the last."""
        return min(1.0, self.state.global_step / max(1, self.args.max_steps - 1))

    # Optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As NemotronHTrainer's, with the router as its own group, without weight decay."""
        if self.optimizer is None:
            self.routed.router.requires_grad_(False)
            super().create_optimizer(model)
            self.routed.router.requires_grad_(True)
            if parameters := list(self.routed.router.parameters()):
                group = {"params": parameters, "lr": self.router_learning_rate, "weight_decay": 0.0}
                self.optimizer.add_param_group(group)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As NemotronHTrainer's; in a WSD schedule the router has its own warm-up."""
        if self.route.fixed or not self.args.uses_wsd or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        model_factor = super().create_scheduler(num_training_steps, optimizer).lr_lambdas[0]
        per_step = self.args.tokens_per_step
        total = num_training_steps * per_step
        decay = parse_tokens(self.args.decay_tokens, "decay_tokens", total)
        schedule = Schedule(total, 0, decay, self.args.min_lr_ratio, self.args.decay_shape)

        def router_factor(step: int) -> float:
            return min(1.0, (step + 1) / max(1, self.router_warmup_steps)) * schedule.factor((step + 1) * per_step)

        optimizer = optimizer or self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        factors = [model_factor] * (len(optimizer.param_groups) - 1)
        self.lr_scheduler = LambdaLR(optimizer, [*factors, router_factor])
        return self.lr_scheduler

    # A step

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As NemotronHTrainer's, with rows cut to the sequence length of the stage."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_step = 0
        length = self._stage().sequence_length
        if length < self.args.sequence_length:
            batches = [shorter(batch, length) for batch in batches]
            num_items = self._get_num_items_in_batch(batches, device)
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None
    ) -> Any:
        """As DistillationTrainer's; in training for the budget that is drawn, in evaluation for the one that is fixed."""
        if model.training:
            numbers = self.args.seed, self.state.global_step, self._micro_step
            drawn = draw(
                self._stage().weights, self.route.axes, self.route.settings.hard_share, *numbers, self.sandwich
            )
            self._drawn, self._micro_step = drawn.budget, self._micro_step + 1
            self.routed.sample(drawn, self.progress)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _ask_teacher(self, inputs: dict[str, Tensor]) -> LiveTeacher | TopK:
        if not (self.live_teacher and self.model.training and self._drawn):
            return super()._ask_teacher(inputs)
        with self.routed.whole(), torch.no_grad():
            given = inputs["input_ids"], inputs.get("position_ids"), inputs.get("attention_mask")
            return LiveTeacher(teacher_hidden_states(self.model, *given), self.model.get_output_embeddings())

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As transformers', for the weights; the router by itself. The term that keeps the whole model whole makes its gradient
        forty times theirs, and together they would be clipped away."""
        parameters = [p for p in self.routed.router.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        aside = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        norm = super()._clip_grad_norm(model)
        for parameter, gradient in zip(parameters, aside):
            parameter.grad = gradient
        return norm

    def _stage(self) -> Stage:
        return stage_at(self.stages, self.state.global_step * self.args.tokens_per_step)

    def _loss(
        self,
        hidden_states: Tensor,
        lm_head: nn.Module,
        labels: Tensor,
        teacher: LiveTeacher | TopK,
        num_items_in_batch: Tensor | int | None,
        train: bool,
    ) -> Tensor:
        loss = super()._loss(hidden_states, lm_head, labels, teacher, num_items_in_batch, train)
        if not train:
            return loss
        share = share_of_items(num_items_in_batch, labels)  # the router's loss is a mean already
        weight = self.router_loss_weight * (share.to(loss.device) if isinstance(share, Tensor) else share)
        return loss + weight * self.routed.router_loss.to(loss)

    def _keep(
        self, out: DistillationLoss, labels: Tensor, num_items_in_batch: Tensor | int | None, train: bool
    ) -> None:
        super()._keep(out, labels, num_items_in_batch, train)
        items = (labels[:, 1:] != IGNORE).sum().to(self._sums)
        divisor = items if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(self._sums)
        sums = [out.kl.to(self._sums) * divisor, out.cross_entropy.to(self._sums) * divisor, items]
        if train:
            of_router = self.routed.router_loss.detach().to(self._sums)
            self._sums[self._drawn] += torch.stack([*sums, of_router, torch.ones_like(items)])
        else:
            self._held_out += torch.stack(sums)

    # Logging and evaluating

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As DistillationTrainer's, with the figures named at the head of the file in addition to a training loss."""
        if "loss" in logs:
            logs |= self._figures()
            self._sums.zero_()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        children: Mapping[str, Child] | None = None,
    ) -> dict[str, float]:
        """As transformers', once for each child (by default the router's present choices), with hard masks.

        eval_BUDGET_loss is the loss that is trained; eval_BUDGET_cross_entropy and eval_BUDGET_kl are its parts.
        """
        metrics: dict[str, float] = {}
        for name, child in (self.routed.children() if children is None else children).items():
            self.routed.fix(child)
            self._held_out.zero_()
            prefix = f"{metric_key_prefix}_{name}"
            metrics |= super().evaluate(eval_dataset, ignore_keys, prefix)
            kl, cross_entropy, items = self._over_processes(self._held_out).tolist()
            items = items or math.nan
            parts = {f"{prefix}_cross_entropy": cross_entropy / items, f"{prefix}_kl": kl / items}
            self.log(parts)
            metrics |= parts
        self.routed.fix(None)
        return metrics

    def _figures(self) -> dict[str, float]:
        sums = dict(zip(self.names, self._over_processes(self._sums).tolist()))
        weight, figures = self.cross_entropy_weight, {}
        for name, (kl, cross_entropy, items, of_router, micro_steps) in sums.items():
            if items:
                kl, cross_entropy = kl / items, cross_entropy / items
                loss = (1 - weight) * kl + weight * cross_entropy
                found = {"loss": loss, "kl": kl, "cross_entropy": cross_entropy, "router_loss": of_router / micro_steps}
                figures |= {f"{key}_{name}": value for key, value in found.items()}
        if self.route.fixed:
            return figures
        for name, target in self.route.targets.items():
            figures[f"size_{name}"] = self.routed.expected_size(target, self.progress)
            figures[f"target_{name}"] = target / self.route.cost.full
            figures |= {f"choice_{name}_{field}": size for field, size in self._choices(target).items()}
        figures["router_learning_rate"] = self.optimizer.param_groups[-1]["lr"]
        return figures

    def _choices(self, target: float) -> dict[str, float]:
        """Field -> the most likely size, the mean over layers where they choose for themselves."""
        logits = self.routed.logits(target)
        chosen = {}
        for axis in self.route.axes:
            rows = logits[axis.field].argmax(-1).tolist() * (1 if axis.per_layer else len(axis.sizes))
            sizes = [of[row] for of, row in zip(axis.sizes, rows)]
            chosen["num_layers" if axis.field == DEPTH else axis.field] = sum(sizes) / len(sizes)
        return chosen

    def _over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums.clone(), "sum").cpu()

    # Saving and resuming

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers'; a checkpoint of the run has the router next to the weights (of FSDP, among them)."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and not self.is_fsdp_enabled and self.args.should_save:
            save_router(self.routed, Path(output_dir) / ROUTER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            load_router(self.routed, Path(resume_from_checkpoint) / ROUTER_FILE)


def save_router(routed: RoutedModel, path: Path, write: bool = True) -> None:
    """The router's weights with what they were trained for; of a sharded one every process calls this, and one writes."""
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().contiguous()
        for name, value in routed.router.state_dict().items()
    }
    if not write:
        return
    with whole_file(path) as part:
        save_file(weights, part, metadata=_identity(routed.route))


def load_router(routed: RoutedModel, path: Path) -> None:
    """Put saved weights into the router.

    Raises:
        ValueError: if there are none, or of other budgets or choices.
    """
    if not path.is_file():
        raise ValueError(f"resume_from_checkpoint: {path} is missing, without the router the run cannot continue")
    with open_tensors(path) as file:
        for name, value in _identity(routed.route).items():
            if (found := file.metadata().get(name)) != value:
                raise ValueError(f"{name}={value}: allowed is what {path} was trained with, {found}")
        routed.router.load_state_dict({name: file.get_tensor(name) for name in file.keys()})


def _identity(route: Route) -> dict[str, str]:
    choices = {axis.field: (axis.sizes[0], axis.per_layer) for axis in route.axes}
    fixed = {"sizes": str({name: child.budget.sizes() for name, child in route.fixed.items()})} if route.fixed else {}
    return {"budgets": str(dict(route.targets)), "choices": str(choices), "module": ROUTER, **fixed}
