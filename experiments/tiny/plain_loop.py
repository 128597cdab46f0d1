"""A plain pretraining loop for one device, to compare `nemotron-h pretrain` with: windows of a token stream, exact resume.

What a step sees is a function of (seed, step) alone: the stream is cut into windows of `sequence_length` tokens, each
epoch visits them in an order drawn from seed and epoch. The learning rate warms up, stays, and decays linearly to a
tenth over the last part (WSD), so a run may be lengthened as long as its decay has not begun. Weights, moments
and the step live in one safetensors file that is replaced in a single rename: a run killed at any moment resumes from
the last save and repeats the same losses bit by bit (same device, same thread count).
"""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from nemotron_h_hf.inputs import open_tensors, read_checked, tensors_digest
from nemotron_h_hf.training.monitor import forget_after
from nemotron_h_hf.whole_files import whole_file

STATE_FILE = "state.safetensors"
LOG_FILE = "log.jsonl"
MOMENTS = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")  # of Muon and of AdamW


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast; `max_tokens` is rounded down to whole steps of batch_size x sequence_length."""

    max_tokens: int
    sequence_length: int = 1024
    batch_size: int = 4
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    decay_share: float = 0.3
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    log_steps: int = 10
    save_steps: int = 100
    time_limit_minutes: float = float("inf")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def total_steps(self) -> int:
        return self.max_tokens // self.tokens_per_step


def train(model: nn.Module, stream: Tensor, settings: LoopSettings, folder: Path) -> bool:
    """Train `model` on `stream` (int64, one dimension) from the last save in `folder`, or from the start.

    Returns True when all tokens were spent, False when the time limit stopped it first (call again to continue).
    """
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, settings)
    step = load_state(model, optimizers, folder)
    forget_after(folder / LOG_FILE, step)
    started, losses = time.monotonic(), []
    model.train()
    bar = tqdm(
        total=settings.total_steps * settings.tokens_per_step,
        initial=step * settings.tokens_per_step,
        unit="tok",
        unit_scale=True,
        smoothing=0.05,
    )
    with bar, (folder / LOG_FILE).open("a", encoding="utf-8") as log:
        while step < settings.total_steps and time.monotonic() - started < 60 * settings.time_limit_minutes:
            batch = batch_of_step(stream, settings, step).to(device)
            loss, grad_norm = train_step(model, optimizers, batch, settings, step)
            losses.append(loss)
            step += 1
            bar.update(settings.tokens_per_step)
            if step % settings.log_steps == 0 or step == settings.total_steps:
                mean = sum(losses) / len(losses)
                bar.set_postfix(loss=f"{mean:.3f}")
                seconds = time.monotonic() - started
                write_log(log, step, settings, mean, grad_norm, seconds)
                losses.clear()
            if step % settings.save_steps == 0:
                save_state(model, optimizers, step, folder)
    save_state(model, optimizers, step, folder)
    return step >= settings.total_steps


def train_step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Tensor, settings: LoopSettings, step: int
) -> tuple[float, float]:
    """One forward, backward and update on `batch` (b, l); loss in nats per token and gradient norm before clipping."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
    autocast = torch.autocast("cuda", torch.bfloat16) if batch.is_cuda else nullcontext()
    with autocast:
        loss = model(input_ids=batch, labels=batch, skip_logits=True, use_cache=False).loss
    if not torch.isfinite(loss):
        raise ValueError(f"loss: {loss.item()} at step {step}; lower learning_rate (now {settings.learning_rate})")
    model.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item(), grad_norm.item()


def learning_rate(settings: LoopSettings, step: int) -> float:
    """Warm-up, constant, then a straight line down to a tenth over the last `decay_share` of the steps."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    decay_steps = max(settings.decay_share * settings.total_steps, 1)
    remaining = min(1.0, (settings.total_steps - step) / decay_steps)
    return settings.learning_rate * warmup * (0.1 + 0.9 * remaining)


def batch_of_step(stream: Tensor, settings: LoopSettings, step: int) -> Tensor:
    """The (batch_size, sequence_length) windows of `step`; they depend on the seed and the step alone."""
    num_windows = stream.numel() // settings.sequence_length
    if num_windows < settings.batch_size:
        raise ValueError(
            f"stream: {num_windows} windows of {settings.sequence_length} tokens, "
            f"allowed is batch_size ({settings.batch_size}) or more"
        )
    steps_per_epoch = num_windows // settings.batch_size
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(num_windows, generator=generator)
    chosen = order[position * settings.batch_size : (position + 1) * settings.batch_size]
    windows = stream[: num_windows * settings.sequence_length].view(num_windows, settings.sequence_length)
    return windows[chosen].long()


def make_optimizers(model: nn.Module, settings: LoopSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest; only those matrices and the head decay.

    Without decay: A_log, D, dt_bias, norms, biases, convolutions and the embedding.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    matrices, decayed, undecayed = [], [], []
    for parameter in model.parameters():
        if parameter.ndim == 2 and id(parameter) not in embeddings | head:
            matrices.append(parameter)
        else:
            (decayed if id(parameter) in head - embeddings else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return [
        torch.optim.Muon(
            matrices, settings.learning_rate, settings.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        adamw,
    ]


def save_state(model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, folder: Path) -> None:
    """Weights, moments and step as one file that appears whole or not at all."""
    tensors = {f"model.{name}": p.detach().cpu().clone() for name, p in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, moments in chain.from_iterable(optimizer.state.items() for optimizer in optimizers):
        for moment, value in moments.items():
            tensors[f"{moment}.{names[parameter]}"] = value.detach().cpu().clone()
    with whole_file(folder / STATE_FILE) as part:
        metadata = {"step": str(step)}
        save_file(tensors, part, metadata={**metadata, "sha256": tensors_digest(tensors, metadata)})


def load_state(model: nn.Module, optimizers: list[torch.optim.Optimizer], folder: Path) -> int:
    """Put the last save back into model and optimizer; the step it was taken at, 0 without one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STATE_FILE
    if not path.is_file():
        return 0
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    tensors, metadata = read_checked(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"model.{name}" not in tensors or tensors[f"model.{name}"].shape != parameter.shape:
                raise ValueError(f"output_dir: {path} is of another model (at {name}); choose another folder")
            parameter.copy_(tensors[f"model.{name}"])
            optimizer = owner[parameter]
            for moment in MOMENTS:
                if f"{moment}.{name}" in tensors:
                    optimizer.state[parameter][moment] = tensors[f"{moment}.{name}"].to(parameter.device)
    return int(metadata["step"])


def saved_step(folder: Path) -> int:
    """The step of the last save in `folder`, 0 without one."""
    if not (folder / STATE_FILE).is_file():
        return 0
    with open_tensors(folder / STATE_FILE) as state:
        return int(state.metadata()["step"])


def write_log(log, step: int, settings: LoopSettings, loss: float, grad_norm: float, seconds: float) -> None:
    row = {
        "step": step,
        "tokens": step * settings.tokens_per_step,
        "loss": round(loss, 5),
        "learning_rate": round(learning_rate(settings, step - 1), 8),
        "grad_norm": round(grad_norm, 4),
        "seconds_since_start_or_resume": round(seconds, 1),
    }
    log.write(json.dumps(row) + "\n")
    log.flush()
