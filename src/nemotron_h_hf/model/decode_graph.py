"""One token per row, replayed from a CUDA graph: `generate()` calls it for every token after the first few on a GPU,
if our Triton kernels are chosen (kernels.py).

A step of the 8B is about five hundred launches, which Python issues more slowly than the GPU executes them. The graph is
captured again in each call of `generate()`, after `WARM_STEPS` ordinary steps. A capture takes about as long as one step,
and nothing can be outdated: adapters, weights, hooks, implementations. The cache stays an ordinary growing one: it reserves
room for more tokens, and the graph reads their number on the device. When the room is used up, a new graph is captured.

    b batch, m columns of the mask
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .arguments import CACHE_NAMES
from .cache import GrowingLayer, HybridCache, MambaCacheLayer
from .kernels import attends_in_triton

WARM_STEPS = 2  # ordinary steps before the capture: kernels are compiled there and library handles made
LEAST_ROOM = 64  # tokens that a cache has room for when its graph is captured
NO_LIMIT = 2**62
NOT_CAPTURED = ("output_hidden_states", "output_attentions", "output_router_logits")


def can_replay(model: nn.Module) -> bool:
    """Whether steps of this model can be captured: everything on one GPU, our kernels for all that Triton does, no experts
    (their numbers of tokens are known only on the device), no sliding window, and no hook that would miss the replays."""
    config = model.config.get_text_config()
    if not attends_in_triton(model.get_input_embeddings().weight, config.head_dim, config.mamba_implementation):
        return False
    if config.sliding_window is not None:
        return False
    if "moe" in config.layers_block_type or config._attn_implementation != "sdpa" or model.training:
        return False
    if getattr(model, "hf_quantizer", None) is not None or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or "_hf_hook" in vars(m) for m in model.modules())


def record(step: Callable[[], None]) -> Callable[[], None]:
    """What replays the launches of `step`, which is not computed here."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class DecodeGraph:
    """Called like the model. What a graph does not cover (prompts, padded tokens, recording, further outputs) runs as usual.

    Args:
        forward: the model's own call.
        record: makes a replay of a step.
    """

    def __init__(self, forward: Callable, record: Callable = record) -> None:
        self.forward, self.record, self.warm = forward, record, 0
        self.replay: Callable[[], None] | None = None

    @torch.no_grad()
    def __call__(self, **inputs) -> object:
        name = next((name for name in CACHE_NAMES if name in inputs), None)
        cache = inputs.get(name)
        if not _covered(cache, inputs):
            self.replay, self.warm = None, 0
            return self.forward(**inputs)
        if self.warm < WARM_STEPS:
            self.warm += 1
            return self.forward(**inputs)
        mask = _key_mask(inputs)
        if self.replay is None or not self._fits(cache, inputs["input_ids"]):
            self._capture(name, cache, inputs, mask)
        else:
            _count_token(cache)
        self.input_ids.copy_(inputs["input_ids"])
        if self.mask is not None:
            self.mask[:, : mask.shape[1]].copy_(mask)
        self.replay()
        self.length += 1
        for layer in cache.layers:
            if isinstance(layer, GrowingLayer):
                layer.show(self.length)
        return CausalLMOutputWithPast(logits=self.logits, **{name: cache})

    def _fits(self, cache: HybridCache, input_ids: Tensor) -> bool:
        """Whether the graph was captured on this very memory, for these rows, and there is room for one more token."""
        return input_ids.shape == self.input_ids.shape and self.length < self.room and self.held == _addresses(cache)

    def _capture(self, name: str, cache: HybridCache, inputs: dict, mask: Tensor | None) -> None:
        """Make room, and record one step on the cache as it is now; the step is not computed."""
        self.replay = None  # frees its memory before the next allocates
        self.length, self.room = _make_room(cache)
        self.input_ids = inputs["input_ids"].clone()
        padded = mask is not None and not bool(mask[:, : self.length + 1].all())  # `generate` adds real tokens only
        self.mask = mask.new_zeros(len(mask), self.room, dtype=torch.bool) if padded else None
        masks = {"full_attention": self.mask, "linear_attention": None}
        known = {**inputs, "input_ids": self.input_ids, "attention_mask": masks, "position_ids": None}
        layers, fixed = cache.layers, [_fixed(layer) for layer in cache.layers]

        def step() -> None:
            cache.layers = fixed
            try:
                self.logits = self.forward(**known).logits
            finally:
                cache.layers = layers

        self.fixed = fixed  # the counters that the graph reads
        self.replay, self.held = self.record(step), _addresses(cache)


def _covered(cache: Cache | None, inputs: dict) -> bool:
    """One token per row, after others, in a cache of ours that does not record, with nothing asked for but logits."""
    if not isinstance(cache, HybridCache) or cache.offloading or inputs.get("inputs_embeds") is not None:
        return False
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or ids.shape[1] != 1 or any(inputs.get(output) for output in NOT_CAPTURED):
        return False
    if isinstance(mask, dict) and mask["linear_attention"] is not None:
        return False
    mamba = [layer for layer in cache.layers if isinstance(layer, MambaCacheLayer)]
    return all(layer.has_previous_state[0] and not layer.record_past for layer in mamba)


def _key_mask(inputs: dict) -> Tensor | None:
    """(b, m), nonzero for the keys that a row's new token sees; None for all."""
    mask = inputs.get("attention_mask")
    mask = mask["full_attention"] if isinstance(mask, dict) else mask
    return mask[:, 0, 0] if mask is not None and mask.dim() == 4 else mask


def _make_room(cache: HybridCache) -> tuple[int, int]:
    """(tokens held, tokens there is room for), after growing what has no room left.

    Raises:
        ValueError: for a static cache that is full.
    """
    length, room = 0, NO_LIMIT  # without attention nothing grows
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            length = layer.keys.shape[-2]
            room = layer.reserve(length + LEAST_ROOM)
        elif isinstance(layer, StaticLayer):
            length, room = int(layer.get_seq_length()), layer.max_cache_len
            if length >= room:
                raise ValueError(f"max_cache_len={room}: the static cache is full, {length + 1} tokens are needed")
    return length, room


def _fixed(layer: object) -> object:
    """For a layer that grows, one that writes to the same memory, at a place that the device knows; else the layer itself."""
    if not isinstance(layer, GrowingLayer):
        return layer
    fixed = StaticLayer(layer.key_memory.shape[-2])
    fixed.keys, fixed.values, fixed.device = layer.key_memory, layer.value_memory, layer.keys.device
    fixed.cumulative_length = torch.tensor(layer.keys.shape[-2], device=layer.keys.device)
    fixed.is_initialized = True
    return fixed


def _count_token(cache: HybridCache) -> None:
    """What Python counts in an ordinary step, and in a capture; a replay runs no Python."""
    for layer in cache.layers:
        if isinstance(layer, MambaCacheLayer):
            layer.tokens_seen += 1


def _addresses(cache: Cache) -> list[int]:
    """The addresses of everything that a step reads and writes."""
    found = []
    for layer in cache.layers:
        if isinstance(layer, MambaCacheLayer):
            found += [layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr()]
        elif isinstance(layer, (GrowingLayer, StaticLayer)):
            found += [layer.keys.data_ptr(), layer.values.data_ptr()]
    return found
