"""Caches at the length where decoding is timed: one row is prefilled, all rows of the batch are copies of it.

The time of a step does not depend on the content of the cache, and one row of a long prompt takes seconds where a batch
would take minutes. Keys and values of growing caches are in memory allocated once (`RoomyLayer`), for all models: transformers' own
growing layer copies everything it holds at every token, which would be most of what is timed, and ours keeps spare room,
which would lower the largest batch (`RoomyGrowingLayer` keeps none).
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer

from ..model.arguments import CACHE_NAME
from ..model.cache import GrowingLayer, HybridCache, MambaCacheLayer
from .models import Side

PREFILL_TOKENS = 8192  # that go through a transformer at once; ours has its own such number


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer in memory for `room` tokens; what attention is given is the part in use."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.used = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            b, heads, _, dim = key_states.shape
            self.buffers = [states.new_zeros(b, heads, self.room, dim) for states in (key_states, value_states)]
        end = self.used + key_states.shape[-2]
        if end > self.room:
            raise ValueError(f"room={self.room}: {end} tokens are needed")
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, self.used : end] = states
        self._show(end)
        return self.keys, self.values

    def skip(self, tokens: int) -> None:
        """Count zeros as tokens, up to the room there is."""
        self._show(min(self.used + tokens, self.room))

    def _show(self, end: int) -> None:
        self.used = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


class RoomyGrowingLayer(GrowingLayer):
    """The same for our own layer, which CUDA graphs of `generate()` write into."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.lazy_initialization(key_states, value_states)
        b, heads, length, dim = key_states.shape
        self.key_memory, self.value_memory = (s.new_zeros(b, heads, self.room, dim) for s in (key_states, value_states))
        self.show(length)
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        return self.keys, self.values

    def skip(self, tokens: int) -> None:
        """Count zeros as tokens, up to the room there is."""
        self.show(min(self.keys.shape[-2] + tokens, self.room))


def empty_cache(side: Side, room: int, static: bool) -> Cache:
    """A cache for up to `room` tokens: static for compiled steps, else one that grows in place."""
    config = side.model.config
    if static:
        return HybridCache(config, room) if side.name == "ours" else StaticCache(config=config, max_cache_len=room)
    ours = side.name == "ours"
    cache, roomy = (HybridCache(config), RoomyGrowingLayer) if ours else (DynamicCache(config=config), RoomyLayer)
    cache.layers = [roomy(room) if isinstance(layer, DynamicLayer) else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor, cache: Cache, part: int = PREFILL_TOKENS) -> Tensor:
    """Feed a prompt (b, l) in parts; logits (b, vocab) of its last token."""
    for ids_part in ids.split(part, dim=1):
        logits = model(ids_part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


@torch.no_grad()
def filled_cache(side: Side, row: Cache, rows: int, room: int, static: bool) -> Cache:
    """A cache of `rows` copies of the one row in `row`, with room for `room` tokens."""
    cache = empty_cache(side, room, static)
    for index, layer in enumerate(row.layers):
        if isinstance(layer, MambaCacheLayer):
            conv, ssm = (_copies(states[0], rows) for states in (layer.conv_states, layer.recurrent_states))
            cache.layers[index].store(conv, ssm, layer.tokens_seen)
        elif isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            cache.update(_copies(layer.keys, rows), _copies(layer.values, rows), index)
        elif isinstance(layer, LinearAttentionLayer) and layer.is_recurrent_states_initialized[0]:
            cache.update_conv_state(_copies(layer.conv_states[0], rows), index)
            cache.update_recurrent_state(_copies(layer.recurrent_states[0], rows), index)
    return cache


def _copies(states: Tensor, rows: int) -> Tensor:
    """(1, ...) -> (rows, ...), without copying."""
    return states.expand(rows, *states.shape[1:])
