"""Next-token loss from hidden states, a few positions at a time: the logits of a whole batch never exist.

A vocabulary of 131,072 turns 8,192 positions into 4 GiB of fp32 logits, and training needs three such tensors. Here each
chunk's logits live only while its loss (and later its gradient) is computed; of a small batch they are kept, which saves
`lm_head`'s second pass. `lm_head` is called as a module.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .linear import project
from .ssd import under_func

IGNORE = -100
LOGITS_PER_CHUNK = 2**24  # 64 MiB in fp32
CHUNKS_AT_ONCE = {"cuda": 8}  # fewer and larger: each adds its share to the gradient of lm_head, a pass over all of it
KEPT_LOGITS = 2**26  # up to this size all chunks are kept for the backward pass; above it they are recomputed


def next_token_loss(
    hidden_states: Tensor,
    lm_head: nn.Module,
    vocab_size: int,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Cross-entropy of each position's prediction of the next token, in fp32.

    Args:
        hidden_states: (b, l, hidden), the last layer's output after the final norm; or logits.
        lm_head: the module that makes logits (..., vocab_size); nn.Identity() of logits.
        labels: (b, l); position t is trained on labels[t + 1]. `ignore_index` counts as no label.
        num_items_in_batch: divisor of the summed loss (gradient accumulation); None for the number of labels.
        shift_labels: (b, l) labels already shifted; replaces `labels`.

    Returns:
        Scalar loss.
    """
    targets = next_targets(labels, ignore_index) if shift_labels is None else shift_labels.flatten()
    targets = targets.to(hidden_states.device)

    def summed(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(project(lm_head, rows).float(), targets, ignore_index=ignore_index, reduction="sum")

    at_once = CHUNKS_AT_ONCE.get(hidden_states.device.type, 1)
    total = sum_in_chunks(
        summed, (hidden_states.flatten(0, -2), targets), vocab_size, at_once, KEPT_LOGITS // vocab_size
    )
    return per_item(total, targets, num_items_in_batch, ignore_index)


def next_targets(labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Labels (b, l) -> what each position predicts, (b * l): the label of the next, and none at the end of a row."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index).flatten()


def sum_in_chunks(
    summed: Callable[..., Tensor],
    rows: Sequence[Tensor],
    vocab_size: int,
    at_once: int = 1,
    kept_positions: int | None = None,
) -> Tensor:
    """Sum of `summed(a part of each of rows)` over parts of at most `at_once * LOGITS_PER_CHUNK` logits.

    Of more than `kept_positions` (one part's, if None), each part is computed again in the backward pass: one part's
    logits are alive at a time.
    """
    positions = positions_per_chunk(vocab_size, at_once)
    kept_positions = positions if kept_positions is None else kept_positions
    recompute = torch.is_grad_enabled() and len(rows[0]) > kept_positions and not under_func()
    parts = zip(*(tensor.split(positions) for tensor in rows))
    total = None
    for part in parts:
        more = checkpoint(summed, *part, use_reentrant=False, preserve_rng_state=False) if recompute else summed(*part)
        total = more if total is None else total + more
    return total


def positions_per_chunk(vocab_size: int, at_once: int = 1) -> int:
    """How many positions have `at_once * LOGITS_PER_CHUNK` logits; at least one."""
    return max(1, LOGITS_PER_CHUNK * at_once // vocab_size)


def per_item(
    total: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None, ignore_index: int = IGNORE
) -> Tensor:
    """A sum over positions, divided by the items of the accumulated batch (0 if it has none), or by the targets of this one."""
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    return total / divisor(num_items_in_batch, total.device)


def share_of_items(
    num_items_in_batch: Tensor | int | None,
    labels: Tensor | None,
    shift_labels: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Tensor | float:
    """The share of an accumulated batch that this one is; 1 for all of it.

    It weighs terms that are means already (the balance loss of experts). Otherwise they would count once per
    accumulation step and process, but the summed loss only once.
    """
    if num_items_in_batch is None or (labels is None and shift_labels is None):
        return 1.0
    items = ((labels[:, 1:] if shift_labels is None else shift_labels) != ignore_index).sum()
    return items / divisor(num_items_in_batch, items.device)


def divisor(num_items_in_batch: Tensor | int, device: torch.device) -> Tensor | int:
    """The number of items, on that device; 1 instead of 0, as the sums of a batch without a label are 0."""
    if not isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch or 1
    num_items_in_batch = num_items_in_batch.to(device)
    return num_items_in_batch.masked_fill(num_items_in_batch == 0, 1)
