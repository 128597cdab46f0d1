"""Multi-token prediction: from a position's hidden state and the next token, the logits of the token after it.

Depth d of position t reads what depth d - 1 made of it and the embedding of the token d places on:

    h0(t)   the stack's output, after norm_f
    x(t)  = eh_proj([enorm(embedding of token t + d), hnorm(h of depth d - 1)])
    h(t)  = final_layernorm(blocks(x(t)))          blocks: one pattern of layers, such as "*E"
    lm_head(h(t))                                  logits of token t + d + 1

Source: arXiv 2412.19437, section 2.2; the order of the pair, and h0 behind the final norm, as in Megatron-LM's HybridModel.
`num_nextn_predict_layers` depths have weights; the last one repeats for all that are deeper, as Nemotron 3 Super is
trained. Layer i of a depth is `mtp.layers.{depth * layers of a depth + i}`.

    b batch, l length
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .blocks import NemotronHBlock, NemotronHRMSNorm, run_blocks
from .cache import HybridCache
from .configuration_nemotron_h import NemotronHConfig
from .linear import project
from .loss import IGNORE, divisor, next_token_loss
from .padding import Rows


class NemotronHMTPBlock(NemotronHBlock):
    """A layer of a depth: the first one joins embedding and hidden state before, the last one has a norm behind."""

    def __init__(self, config: NemotronHConfig, layer_idx: int, kind: str, position: int) -> None:
        super().__init__(config, layer_idx, kind)
        hidden, eps = config.hidden_size, config.layer_norm_epsilon
        self.layer_idx = self.mixer.layer_idx = position  # of the depth's own cache
        self.is_first, self.is_last = position == 0, position == len(config.mtp_layers_block_type) - 1
        if self.is_first:
            self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
            self.enorm, self.hnorm = NemotronHRMSNorm(hidden, eps), NemotronHRMSNorm(hidden, eps)
        if self.is_last:
            self.final_layernorm = NemotronHRMSNorm(hidden, eps)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """(b, l, hidden), of the first layer (b, l, embedding + hidden) -> (b, l, hidden)."""
        if self.is_first:
            embeds, before = hidden_states.chunk(2, dim=-1)
            hidden_states = project(self.eh_proj, torch.cat([self.enorm(embeds), self.hnorm(before)], dim=-1))
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return self.final_layernorm(hidden_states) if self.is_last else hidden_states


class NemotronHMTP(nn.Module):
    """All depths. The weights ask for no gradients until `requires_grad_` says so: without their loss they get none."""

    _no_split_modules = ["NemotronHMTPBlock"]  # read by the model's post_init

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.config, kinds = config, config.mtp_layers_block_type
        self.layers = nn.ModuleList(
            NemotronHMTPBlock(config, config.num_hidden_layers + index, kinds[index % len(kinds)], index % len(kinds))
            for index in range(config.num_nextn_predict_layers * len(kinds))
        )
        self.requires_grad_(False)

    def forward(
        self, hidden_states: Tensor, embeds: Tensor, rows: Rows, depth: int = 0, cache: Cache | None = None
    ) -> Tensor:
        """One depth: (b, l, hidden) of the depth before and (b, l, hidden) of the tokens -> (b, l, hidden) for lm_head.

        Args:
            hidden_states: the stack's output for depth 0, else what this returned for the depth before.
            embeds: embeddings of the tokens `depth` + 1 places on.
            rows: padding and documents of these columns.
            cache: of this depth alone, see `new_cache`.
        """
        joined = torch.cat([embeds.to(hidden_states), hidden_states], dim=-1)
        output = run_blocks(self.blocks(depth), None, self.config, joined, rows, cache)
        return output.to(hidden_states.dtype)

    @property
    def num_depths(self) -> int:
        """Depths with weights."""
        return len(self.layers) // len(self.config.mtp_layers_block_type)

    def blocks(self, depth: int) -> nn.ModuleList:
        """The layers of a depth."""
        count = len(self.config.mtp_layers_block_type)
        start = min(depth, self.num_depths - 1) * count
        return self.layers[start : start + count]

    def new_cache(self) -> HybridCache:
        """An empty cache for one depth."""
        own = copy.copy(self.config)
        own.layers_block_type = self.config.mtp_layers_block_type
        return HybridCache(own)

    def loss(
        self,
        hidden_states: Tensor,
        embeds: Tensor,
        lm_head: nn.Module,
        labels: Tensor,
        rows: Rows,
        num_steps: int | None = None,
        num_items: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean over depths of the cross-entropy of the tokens that each predicts, in fp32 (arXiv 2412.19437, eqs. 24, 25).

        Args:
            hidden_states, embeds: (b, l, hidden) of the stack and of the row's own tokens.
            labels: (b, l), not shifted, -100 for none. A document's last tokens predict nothing of the next document.
            num_steps: depths, by default those with weights.
            num_items: divisor, that of the main loss; None for the number of labels that the main loss has.

        Returns:
            The sums over tokens divided by `num_items`, to train on, and divided by their own number of tokens, to look at.
        """
        if num_items is None:
            num_items = (_later(labels, 1, IGNORE) != IGNORE).sum()
        sums, means = [], []
        for depth in range(num_steps or self.num_depths):
            embeds = F.pad(embeds[:, 1:], (0, 0, 0, 1))
            hidden_states = self(hidden_states, embeds, rows, depth)
            targets = _later(labels, depth + 2, IGNORE)
            if rows.documents is not None:
                targets = targets.masked_fill(_later(rows.documents, depth + 2, -1) != rows.documents, IGNORE)
            sums.append(next_token_loss(hidden_states, lm_head, self.config.vocab_size, None, 1, targets))
            means.append(sums[-1].detach() / (targets != IGNORE).sum().clamp(min=1))
        return torch.stack(sums).mean() / divisor(num_items, sums[0].device), torch.stack(means).mean()


def _later(x: Tensor, steps: int, beyond: int) -> Tensor:
    """(b, l) of the tokens `steps` places on, `beyond` after a row's end."""
    steps = min(steps, x.shape[1])
    return F.pad(x[:, steps:], (0, steps), value=beyond)


def add_mtp(model: PreTrainedModel, depth: int, pattern: str | None = None) -> None:
    """Give a language model fresh heads, `depth` of them, and the fields of its configuration.

    Args:
        pattern: layers of a depth, such as "*E"; by default attention (where the model has any, else Mamba) and experts or
            an MLP.

    Raises:
        ValueError: for a model that has multi-token prediction, or fields that its configuration does not allow.
    """
    config = model.config
    if config.num_nextn_predict_layers:
        raise ValueError(
            f"mtp_depth={depth}: allowed is None, or {config.num_nextn_predict_layers} as the model has it already "
            "(num_nextn_predict_layers)"
        )
    kinds = config.hybrid_override_pattern
    pattern = pattern or ("*" if "*" in kinds else "M") + ("E" if "E" in kinds else "-")
    before = config.num_nextn_predict_layers, config.mtp_layers_block_type
    config.mtp_layers_block_type = NemotronHConfig(
        num_nextn_predict_layers=1, mtp_hybrid_override_pattern=pattern
    ).mtp_layers_block_type
    config.num_nextn_predict_layers = depth
    try:
        config.validate()
    except ValueError:
        config.num_nextn_predict_layers, config.mtp_layers_block_type = before
        raise
    with torch.device(model.device):
        model.mtp = NemotronHMTP(config).to(model.dtype)
    model.mtp.apply(model._init_weights)
