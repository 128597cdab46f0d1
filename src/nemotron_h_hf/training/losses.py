"""Distillation loss from hidden states, a few positions at a time: no model's logits of a whole batch ever exist.

With temperature T, the teacher's p = softmax(z_T / T) and the student's q = softmax(z_S / T), each position costs

    T^2 * KL(p || q) = T^2 * sum over the vocabulary of p_i * (log p_i - log q_i)

(arXiv 1503.02531; forward KL on logits alone with T = 1 is how Nemotron-H-47B came from the 56B, arXiv 2504.03624).
Where only the teacher's k largest logits are kept, S their tokens, all other tokens become one bucket on both sides:

    r = 1 - sum over S of p_i,    s = 1 - sum over S of q_i
    T^2 * (sum over S of p_i * (log p_i - log q_i) + r * (log r - log s))

That is the KL of the two distributions after merging outcomes: never more than the full one, zero when the student
agrees, and it still lowers the probability that the student puts outside S. (Renormalising p over S would not.)

    b batch, l length, n positions (b * l), v vocabulary, k kept tokens
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.loss import IGNORE, next_targets, per_item, positions_per_chunk, sum_in_chunks


class LiveTeacher(NamedTuple):
    """What a teacher in memory knows of a batch."""

    hidden_states: Tensor  # (b, l, hidden), its last layer's output after the final norm
    lm_head: nn.Module  # makes logits (..., v) of it; called per chunk


class TopK(NamedTuple):
    """The largest k logits of a teacher and the mass of the rest, as log-probabilities at one temperature."""

    ids: Tensor  # (b, l, k) integers, all different at a position
    log_probs: Tensor  # (b, l, k), log p_i
    log_rest: Tensor  # (b, l), log r


class DistillationLoss(NamedTuple):
    """Scalars, each the sum over positions divided by `num_items_in_batch`; only `loss` has a gradient."""

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor


def distillation_loss(
    hidden_states: Tensor,
    lm_head: nn.Module,
    labels: Tensor,
    vocab_size: int,
    teacher: LiveTeacher | TopK,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
) -> DistillationLoss:
    """(1 - w) * T^2 * KL(teacher || student) + w * cross-entropy with the labels (at temperature 1), in fp32 or wider.

    Both heads are called as modules, once per chunk, and once more in the backward where there is more than one chunk.
    Every position is computed, and those without a label count as 0: all processes of a sharded model make the
    same calls.

    Args:
        hidden_states: (b, l, hidden) of the student, after its final norm.
        lm_head: the student's.
        labels: (b, l), not shifted: position t counts if labels[t + 1] is not -100.
        vocab_size: v of the student.
        teacher: live, or kept top-k at this same temperature.
        cross_entropy_weight: w, from 0 (KL alone) to 1.
        num_items_in_batch: divisor of the sums (gradient accumulation); None for the number of positions that count.

    Raises:
        ValueError: for a temperature or weight out of range, or a teacher of other shapes or another vocabulary.
    """
    _check(hidden_states, vocab_size, teacher, temperature, cross_entropy_weight)
    targets = next_targets(labels).to(hidden_states.device)
    student = hidden_states.flatten(0, 1)
    live = isinstance(teacher, LiveTeacher)
    kept = (teacher.hidden_states.detach(),) if live else teacher
    kept = tuple(tensor.to(student.device).flatten(0, 1) for tensor in kept)
    teacher_head = teacher.lm_head if live else None

    def summed(student: Tensor, targets: Tensor, *kept: Tensor) -> Tensor:
        return _summed(student, targets, kept, lm_head, teacher_head, temperature)

    total = sum_in_chunks(summed, (student, targets, *kept), vocab_size)
    kl, cross_entropy = (per_item(sums, targets, num_items_in_batch) for sums in (total[0], total[1]))
    w = cross_entropy_weight
    loss = kl if w == 0 else cross_entropy if w == 1 else (1 - w) * kl + w * cross_entropy
    return DistillationLoss(loss, kl.detach().clone(), cross_entropy.detach().clone())  # Trainer scales loss in place


@torch.no_grad()
def top_k(hidden_states: Tensor, lm_head: nn.Module, vocab_size: int, k: int, temperature: float = 1.0) -> TopK:
    """What to keep of a teacher's logits: (b, l, hidden) -> ids int32, log-probabilities and log r in fp32, in chunks.

    Raises:
        ValueError: unless 1 <= k < vocab_size.
    """
    if not 1 <= k < vocab_size:
        raise ValueError(f"k={k}: allowed is 1 to {vocab_size - 1}, less than the vocabulary")
    rows = hidden_states.flatten(0, 1)
    parts = []
    for chunk in rows.split(positions_per_chunk(vocab_size)):
        log_probs = _wide(lm_head(chunk)).div(temperature).log_softmax(-1)
        largest = log_probs.topk(k, dim=-1)
        rest = log_probs.scatter_(1, largest.indices, -torch.inf).logsumexp(-1)
        parts.append((largest.indices.int(), largest.values.float(), rest.float()))
    ids, log_probs, log_rest = (torch.cat(tensors).unflatten(0, hidden_states.shape[:2]) for tensors in zip(*parts))
    return TopK(ids, log_probs, log_rest)


def _summed(
    student: Tensor,
    targets: Tensor,
    kept: Sequence[Tensor],
    lm_head: nn.Module,
    teacher_head: nn.Module | None,
    temperature: float,
) -> Tensor:
    """(2): T^2 * KL and cross-entropy, each summed over the chunk's positions that count."""
    logits = _wide(lm_head(student))
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    log_q = logits.div(temperature).log_softmax(-1)
    if teacher_head is None:
        divergence = _bucketed_kl(TopK(*kept), log_q)
    else:
        with torch.no_grad():
            log_p = _wide(teacher_head(*kept)).div(temperature).log_softmax(-1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    counted = targets != IGNORE
    return torch.stack([temperature**2 * divergence.masked_fill(~counted, 0.0).sum(), cross_entropy])


def _bucketed_kl(teacher: TopK, log_q: Tensor) -> Tensor:
    """KL per position (n) over the k kept tokens and one bucket for all others."""
    ids = teacher.ids.long()
    log_p, log_r = teacher.log_probs.to(log_q.dtype), teacher.log_rest.to(log_q.dtype)
    log_s = log_q.scatter(1, ids, -torch.inf).logsumexp(-1)  # not log(1 - sum): that has no digits left when r is small
    on_kept = (log_p.exp() * (log_p - log_q.gather(1, ids))).sum(-1)
    return on_kept + log_r.exp() * (log_r - log_s)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(
    hidden_states: Tensor, vocab_size: int, teacher: LiveTeacher | TopK, temperature: float, weight: float
) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: allowed is more than 0")
    if not 0 <= weight <= 1:
        raise ValueError(f"cross_entropy_weight={weight}: allowed is 0 (the teacher alone) to 1 (the labels alone)")
    if teacher[0].shape[:2] != hidden_states.shape[:2]:
        raise ValueError(
            f"the teacher has (batch, length) {tuple(teacher[0].shape[:2])}, the student {tuple(hidden_states.shape[:2])}"
        )
    if isinstance(teacher, TopK) and not teacher.ids.shape[-1] < vocab_size:
        raise ValueError(f"k={teacher.ids.shape[-1]}: allowed is less than vocab_size={vocab_size}")
