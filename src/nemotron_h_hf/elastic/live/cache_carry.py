"""Converts the cache of one nested model to the shape of another nested model of the same parent.

States are cut where the other model has fewer heads or channels, and start at zero where it has more, or has one more
Mamba layer. Attention has no empty state, so a model with more attention layers or key/value heads cannot take over a cache.

This is an approximation: the layers below computed something else. `Carried` compares the next token's logits with
those after reading all tokens again; the published figure is 0.9 to 0.96 cosine and a small loss in accuracy (arXiv 2605.07182).

The embedded model of 0.1.0 on one CPU thread, untrained budgets `half` (intermediate_size=288, mamba_num_heads=4) and `mild` (432, 6):
medians of 32 new tokens, 16 by each budget, and the loss of the 64 tokens after the switch, mean of 18 texts.

    tokens  switch          read again      carried         first budget alone
    256     half to mild    445 ms  3.09    343 ms  3.29    3.69
    2,048   half to mild    1502 ms 2.34    838 ms  2.63    3.06
    2,048   mild to half    1343 ms 3.06    899 ms  2.89    2.34

With `measure=True` everything is read again as well, which takes the time of reading again (1560 ms in the second row).

    b batch, h heads, p head_dim, n state, k conv taps
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.cache import HybridCache, MambaCacheLayer, read_states
from ...model.configuration_nemotron_h import NemotronHConfig
from ...slicing import Kept, kept_of
from ..child import Child


@dataclass(frozen=True)
class Carried:
    """What taking over a cache did to the logits of the next token, against reading all tokens again."""

    num_tokens: int
    max_difference: float
    mean_difference: float  # of the absolute values
    kl: float  # nats, from the exact distribution to the one from the cache taken over; mean over rows
    same_token: float  # share of rows with the same most likely token

    @classmethod
    def between(cls, exact: Tensor, carried: Tensor, num_tokens: int) -> "Carried":
        """From logits (b, vocabulary)."""
        difference = (exact.float() - carried.float()).abs()
        exact_log, carried_log = exact.float().log_softmax(-1), carried.float().log_softmax(-1)
        kl = (exact_log.exp() * (exact_log - carried_log)).sum(-1).mean()
        same = (exact.argmax(-1) == carried.argmax(-1)).float().mean()
        return cls(num_tokens, float(difference.max()), float(difference.mean()), float(kl), float(same))

    def __str__(self) -> str:
        return (
            f"cache of {self.num_tokens} tokens taken over: logits of the next token differ by {self.max_difference:.3g} at "
            f"most, {self.mean_difference:.3g} on average, KL {self.kl:.3g} nats, {self.same_token:.0%} same first choice"
        )


def check_carry(source: Child, target: Child) -> None:
    """Refuse to carry between two children whose attention layers do not allow it.

    Raises:
        ValueError: naming the layers.
    """
    kinds, heads = target.parent.layers_block_type, target.config.num_key_value_heads
    if heads > source.config.num_key_value_heads:
        raise ValueError(
            f"carry_state=True: budget {source.name!r} has {source.config.num_key_value_heads} key/value heads, "
            f"{target.name!r} {heads}: allowed is a budget with as many or more, or carry_state=False"
        )
    lacking = [at for at in target.layers if kinds[at] == "full_attention" and at not in source.layers]
    if lacking:
        raise ValueError(
            f"carry_state=True: budget {source.name!r} has no keys and values for the attention layers {lacking} of "
            f"{target.name!r}: allowed is a budget that keeps them, or carry_state=False"
        )


def carry_cache(cache: HybridCache, source: Child, target: Child) -> HybridCache:
    """The cache of `target` after the tokens that `source` has read into `cache`, which stays as it is.

    Raises:
        ValueError: see `check_carry`.
    """
    check_carry(source, target)
    parent = target.parent
    carried, num_tokens = HybridCache(target.config), int(cache.get_seq_length())
    for own, index in enumerate(target.layers):
        given = cache.layers[source.layers.index(index)] if index in source.layers else None
        if parent.layers_block_type[index] == "full_attention" and given.is_initialized:
            heads = target.config.num_key_value_heads
            read = (tensor[:, :heads, :num_tokens].clone() for tensor in (given.keys, given.values))
            carried.update(*read, own)
        elif isinstance(given, MambaCacheLayer) and given.has_previous_state[0]:
            states = _carry_states(read_states(given), parent, index, source.kept, target.kept)
            carried.layers[own].store(*states, num_tokens)
    _fill_missing(carried, cache, target.config, num_tokens)
    return carried


def _carry_states(
    states: tuple[Tensor, Tensor], parent: NemotronHConfig, index: int, source: Kept, target: Kept
) -> tuple[Tensor, Tensor]:
    """Convolution state (b, channels, k) and state (b, h, p, n) of one layer, in the target's heads and channels."""
    conv, state = states
    # Channels of heads, in the parent's order
    ours, theirs = (kept_of(parent, kept, "x", index) for kept in (source, target))
    shape = target.channels[index].shape
    shared = conv.shape[1] - len(ours)  # of B and C
    places = torch.full((parent.mamba_width(index),), len(ours))  # where the source has it, the end for nowhere
    places[ours] = torch.arange(len(ours))
    found = places[theirs].to(state.device)
    rows = torch.cat([state.flatten(1, 2), state.new_zeros(len(state), 1, state.shape[-1])], dim=1)
    taken = rows.index_select(1, found).unflatten(1, tuple(shape))
    inner = torch.cat([conv[:, : len(ours)], conv.new_zeros(len(conv), 1, conv.shape[-1])], dim=1)
    return torch.cat([inner.index_select(1, found), conv[:, conv.shape[1] - shared :]], dim=1), taken


def _fill_missing(carried: HybridCache, cache: HybridCache, config: NemotronHConfig, num_tokens: int) -> None:
    """Mamba layers that the source does not have begin with nothing read."""
    given = next((t for layer in cache.layers if isinstance(layer, MambaCacheLayer) for t in layer.tensors()), None)
    if given is None:
        return
    for own, layer in enumerate(carried.layers):
        if isinstance(layer, MambaCacheLayer) and not layer.has_previous_state[0]:
            heads, width = config.size("mamba_num_heads", own), config.size("mamba_head_dim", own)
            conv = given.new_zeros(len(given), config.conv_width(own), config.conv_kernel)
            state = given.new_zeros(len(given), heads, width, config.ssm_state_size, dtype=torch.float32)
            layer.store(conv, state, num_tokens)
