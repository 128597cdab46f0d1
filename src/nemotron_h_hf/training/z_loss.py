"""Next-token loss with a z-loss, which keeps the logits of the output layer from drifting: w * mean(logsumexp(logits)^2).

(PaLM, arXiv 2204.02311, section 5, with w = 1e-4.) The model computes its loss inside `forward`, in pieces, and takes
another one through `loss_from_hidden`; this is that other one, in the same pieces.

    b batch, l length, n positions (b * l), v vocabulary
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..model.loss import IGNORE, next_targets, per_item, sum_in_chunks


def next_token_loss_with_z(
    hidden_states: Tensor,
    lm_head: nn.Module,
    labels: Tensor,
    vocab_size: int,
    z_weight: float,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of the next token plus `z_weight` times the mean of logsumexp(logits)^2 over the same positions.

    Args:
        hidden_states: (b, l, hidden).
        labels: (b, l), not shifted, -100 where there is nothing to learn.
        num_items_in_batch: divisor of both sums (gradient accumulation); None for the number of labels.

    Returns:
        Scalar in fp32.
    """
    targets = next_targets(labels).to(hidden_states.device)  # (n)
    hidden_states = hidden_states.flatten(0, 1)

    def summed(hidden_states: Tensor, targets: Tensor) -> Tensor:
        logits = lm_head(hidden_states).float()  # (n, v)
        z = logits.logsumexp(-1)
        cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        return cross_entropy + z_weight * z.square().masked_fill(targets == IGNORE, 0.0).sum()

    return per_item(sum_in_chunks(summed, (hidden_states, targets), vocab_size), targets, num_items_in_batch)
