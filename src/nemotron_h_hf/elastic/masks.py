"""Masked forward: the parent computes what one of its nested models would, exactly, and differentiably in the masks.

    masked = attach_masks(model)                               # from outside: the model's file has no masks
    masked.masks = child_masks(resolve(model.config, budget))  # hard; soft ones, with gradients, are made by a router
    logits = model(input_ids).logits                           # those of the model that `cuts` would cut out
    masked.masks = None                                        # the parent again
    masked.remove()

What a mask multiplies:

    hidden          the input of every block's norm and of the final norm, so all that reads the residual stream
    neurons         the input of an MLP's down_proj; likewise shared_neurons, and expert_neurons behind the activation
    channels        y * silu(gate), the input of a Mamba layer's gated norm
    query_heads     the input of o_proj
    experts         the weights of the chosen experts; an expert whose mask is 0 is never chosen
    experts_per_token      no mask: how many experts each token is sent to, where it is fewer than in the parent
    layers          the mixer's output; a layer whose entry is 0 is not run at all

A norm over d of D channels divides by the root mean square of those d. With a mask m of mean f, norm(x m / sqrt(f)) has
that denominator, eps included (mean over D of x^2 m^2 / f = sum / d), and times sqrt(f) the numerator as well; the gated
norm alike, in each of its groups.

    D hidden, L layers, f neurons, h Mamba heads, p head channels, a query heads, e experts, w and s neurons of an expert
    and of the shared expert, b batch, l length
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn

from ..model.arguments import one_cache
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.modeling_nemotron_h import NemotronHModel
from ..slicing import kept_of
from ..tensors import AXES, Axis, axes_of, size
from .child import Child


@dataclass
class Masks:
    """Values in [0, 1], float; the mappings are by the parent's layer. What is None or absent is not masked.

    `layers` is the share of each mixer that is added to the residual stream. Keep it on the CPU unless it needs a
    gradient: zeros are looked for in it, and reading them from a GPU waits for the device. With a gradient every layer runs.
    """

    hidden: Tensor | None = None  # (D)
    layers: Tensor | None = None  # (L)
    neurons: dict[int, Tensor] = field(default_factory=dict)  # (f)
    channels: dict[int, Tensor] = field(default_factory=dict)  # (h, p)
    query_heads: dict[int, Tensor] = field(default_factory=dict)  # (a)
    experts: dict[int, Tensor] = field(default_factory=dict)  # (e)
    expert_neurons: dict[int, Tensor] = field(default_factory=dict)  # (w)
    shared_neurons: dict[int, Tensor] = field(default_factory=dict)  # (s)
    experts_per_token: dict[int, int] = field(default_factory=dict)


MASKED = tuple(axis for axis in AXES if axis.kind and axis.name in Masks.__dataclass_fields__)
"""The axes of layers that have masks; heads and key/value heads are masked in their channels and query heads."""


def child_masks(child: Child, device: torch.device | str | None = None) -> Masks:
    """The hard masks of a child, fp32, on `device` (`layers` on the CPU); none where all of an axis stays."""
    config, layers, kept = child.parent, child.layers, child.kept
    masks = Masks(_hard(config.hidden_size, kept.hidden, device))
    if len(layers) < config.num_hidden_layers:
        masks.layers = _hard(config.num_hidden_layers, torch.tensor(layers), None)
    for own, index in enumerate(layers):
        if config.layers_block_type[index] == "moe":
            few, all_of_it = (size(of, "num_experts_per_tok", at) for of, at in ((child.config, own), (config, index)))
            masks.experts_per_token |= {index: few} if few != all_of_it else {}
        for axis in axes_of(config.layers_block_type[index]):
            if axis in MASKED:
                indices, shape = getattr(kept, axis.name)[index], _shape(config, axis, index)
                if axis.name == "channels":
                    indices = kept_of(config, kept, "x", index)
                elif axis.within:
                    indices = indices[0]
                mask = _hard(math.prod(shape), indices, device)
                if mask is not None:
                    getattr(masks, axis.name)[index] = mask.view(shape)
    return masks


def attach_masks(model: nn.Module) -> MaskedForward:
    """Let the `NemotronHModel` in `model` (itself, under a head, inside PEFT or another wrapper) run with masks.

    It works under gradient checkpointing, whose second forward sees the masks of the first (soft masks need the default
    `use_reentrant=False`), and under FSDP2, attached before or after sharding. Masked layers may be run with a cache, as
    long as the masks stay the same.

    Raises:
        ValueError: if there is not exactly one such model, or if masks are attached to it already.
    """
    stacks = [module for module in model.modules() if isinstance(module, NemotronHModel)]
    if len(stacks) != 1:
        raise ValueError(f"model={type(model).__name__} holds {len(stacks)} NemotronHModel: allowed is one")
    if any(isinstance(block, _TakesMasks) for block in stacks[0].layers):
        raise ValueError("masks are attached to this model already; call remove() of what attach_masks returned")
    return MaskedForward(stacks[0])


def _hard(size: int, kept: Tensor, device: torch.device | str | None) -> Tensor | None:
    """1 at the kept indices, 0 elsewhere: (size) fp32, or None if all are kept."""
    return None if len(kept) == size else torch.zeros(size).index_fill_(0, kept, 1.0).to(device)


class MaskedForward:
    """Masks on a model, by `attach_masks`. Set `masks` before a forward; None is the parent, as it was."""

    def __init__(self, stack: NemotronHModel) -> None:
        self.stack = stack
        self._masks: Masks | None = None
        self._classes = [(type(block), _masked_class(type(block))) for block in stack.layers]
        for block, (_, masked) in zip(stack.layers, self._classes):
            block.__class__ = masked
        self._hooks = [stack.register_forward_pre_hook(self._hand_over, with_kwargs=True)]
        self._hooks += _norm_hooks(stack.norm_f, lambda: None if self.masks is None else self.masks.hidden)

    @property
    def masks(self) -> Masks | None:
        """The masks of the next forward."""
        return self._masks

    @masks.setter
    def masks(self, masks: Masks | None) -> None:
        if masks is not None:
            check_masks(self.stack.config, masks)
        self._masks = masks

    def remove(self) -> None:
        """Give the model back as it was.

        Raises:
            ValueError: if the blocks were sharded since, which changes their classes once more.
        """
        if any(type(block) is not masked for block, (_, masked) in zip(self.stack.layers, self._classes)):
            raise ValueError("the blocks were wrapped after masks were attached: masks cannot be removed any more")
        for block, (plain, _) in zip(self.stack.layers, self._classes):
            block.__class__ = plain
        for hook in self._hooks:
            hook.remove()

    def _hand_over(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # As an argument of the blocks, because checkpointing then keeps the masks with the inputs.
        return None if self.masks is None else (args, {**kwargs, "elastic_masks": self.masks})


def check_masks(config: NemotronHConfig, masks: Masks) -> None:
    """Raise a ValueError unless every mask has the shape of what it masks."""

    def require(name: str, mask: Tensor | None, *shape: int) -> None:
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}: allowed is {shape}")

    require("hidden", masks.hidden, config.hidden_size)
    require("layers", masks.layers, config.num_hidden_layers)
    for index, few in masks.experts_per_token.items():
        _require_kind(config, "experts_per_token", index, "moe")
        if not 0 < few <= (most := size(config, "num_experts_per_tok", index)):
            raise ValueError(f"experts_per_token[{index}]={few}: allowed is 1 to {most}, what the layer has")
    for axis in MASKED:
        for index, mask in getattr(masks, axis.name).items():
            _require_kind(config, axis.name, index, axis.kind)
            require(f"{axis.name}[{index}]", mask, *_shape(config, axis, index))


def _require_kind(config: NemotronHConfig, name: str, index: int, kind: str) -> None:
    if not 0 <= index < config.num_hidden_layers or config.layers_block_type[index] != kind:
        raise ValueError(f"{name}[{index}]: allowed are the layers of kind {kind}")


def _shape(config: NemotronHConfig, axis: Axis, layer: int) -> tuple[int, ...]:
    """Of the mask of a layer: (h, p) of channels; the experts of a layer share one."""
    of_one = size(config, axis.field, layer)
    return (size(config, "mamba_num_heads", layer), of_one) if axis.name == "channels" else (of_one,)


class _TakesMasks:
    """Tells a block whose masks are attached."""


@cache  # one class for all blocks: an FSDP policy looks for blocks of the class of the first
def _masked_class(plain: type) -> type:
    """A block class that takes `elastic_masks`. It keeps the name, by which FSDP policies find blocks; being a subclass of a
    GradientCheckpointingLayer, its forward is what is recomputed, masks included."""

    class MaskedBlock(plain, _TakesMasks):
        def forward(self, hidden_states: Tensor, elastic_masks: Masks | None = None, **kwargs) -> Tensor:
            if elastic_masks is None:
                return super().forward(hidden_states, **kwargs)
            share = _share(elastic_masks, self.layer_idx)
            if isinstance(share, float) and share == 0:
                _pass_by(self, hidden_states, one_cache(kwargs.get("cache"), kwargs.get("past_key_values")))
                return hidden_states
            with ExitStack() as stack:
                for hook in _norm_hooks(self.norm, lambda: elastic_masks.hidden):
                    stack.enter_context(hook)
                stack.enter_context(_mixer_masked(self, elastic_masks))
                if isinstance(share, Tensor) or share != 1:
                    stack.enter_context(self.mixer.register_forward_hook(partial(_scaled_output, share)))
                return super().forward(hidden_states, **kwargs)

    MaskedBlock.__name__, MaskedBlock.__qualname__ = plain.__name__, plain.__qualname__
    return MaskedBlock


def _share(masks: Masks, index: int) -> float | Tensor:
    """How much of a layer is added: a tensor if it needs a gradient."""
    if masks.layers is None:
        return 1.0
    return masks.layers[index] if masks.layers.requires_grad else float(masks.layers[index])


def _pass_by(block: nn.Module, hidden_states: Tensor, cache) -> None:
    """Count the tokens in the cache of a layer that does not run: masks and positions of the others come from such counts."""
    if cache is None:
        return
    if block.block_type == "linear_attention":
        cache.layers[block.layer_idx].tokens_seen += hidden_states.shape[1]
    elif block.block_type == "full_attention":
        config = block.mixer.config
        shape = hidden_states.shape[0], config.num_key_value_heads, hidden_states.shape[1], config.head_dim
        cache.update(hidden_states.new_zeros(shape), hidden_states.new_zeros(shape), block.layer_idx)


@contextmanager
def _mixer_masked(block: nn.Module, masks: Masks) -> Iterator[None]:
    """The masks of a block's mixer, for the duration of one forward."""
    mixer, index = block.mixer, block.layer_idx
    with ExitStack() as stack:
        if (mask := masks.neurons.get(index)) is not None:
            stack.enter_context(mixer.down_proj.register_forward_pre_hook(partial(_times_input, mask)))
        if (mask := masks.query_heads.get(index)) is not None:
            mask = mask.repeat_interleave(mixer.head_dim)
            stack.enter_context(mixer.o_proj.register_forward_pre_hook(partial(_times_input, mask)))
        if (mask := masks.channels.get(index)) is not None:
            # The mixer recomputes `_mix` in the backward pass, outside of this block's forward: the mask goes with it.
            mixer._mix = partial(_masked_mix, mixer, mask)
            stack.callback(delattr, mixer, "_mix")
        if (mask := masks.shared_neurons.get(index)) is not None:
            down_proj = mixer.shared_experts.down_proj
            stack.enter_context(down_proj.register_forward_pre_hook(partial(_times_input, mask)))
        if (mask := masks.expert_neurons.get(index)) is not None:
            stack.enter_context(mixer.experts.act_fn.register_forward_hook(partial(_times_output, mask)))
        if (mask := masks.experts.get(index)) is not None:
            stack.enter_context(_experts_left_out(mixer.gate, mask))
        if index in masks.experts_per_token:
            stack.callback(setattr, mixer.gate, "top_k", mixer.gate.top_k)
            mixer.gate.top_k = masks.experts_per_token[index]
        yield


def _masked_mix(mixer: nn.Module, mask: Tensor, *args) -> Tensor:
    with ExitStack() as stack:
        for hook in _norm_hooks(mixer.norm, lambda: mask.flatten(), mixer.n_groups):
            stack.enter_context(hook)
        return type(mixer)._mix(mixer, *args)


def _norm_hooks(norm: nn.Module, mask: Callable[[], Tensor | None], num_groups: int = 1) -> list:
    """The rule of the head of the file on a norm whose first argument, (..., d), is masked by `mask()`."""
    dtype = None

    def before(_: nn.Module, args: tuple) -> tuple | None:
        nonlocal dtype
        if (kept := mask()) is None:
            return None
        x, *gate = args
        dtype = gate[0].dtype if gate else x.dtype  # what the norm answers in
        kept = kept.to(x.device, torch.promote_types(x.dtype, torch.float32))
        return (x * (kept * _fractions(kept).rsqrt()), *gate)

    def after(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if (kept := mask()) is None:
            return None
        kept = kept.to(output.device, torch.promote_types(output.dtype, torch.float32))
        return (output * _fractions(kept).sqrt()).to(dtype)

    def _fractions(kept: Tensor) -> Tensor:
        groups = kept.view(num_groups, -1)
        return groups.mean(1, keepdim=True).expand_as(groups).flatten()

    return [norm.register_forward_pre_hook(before), norm.register_forward_hook(after)]


def _times_input(mask: Tensor, _: nn.Module, args: tuple) -> tuple:
    return (args[0] * mask.to(args[0]), *args[1:])


def _times_output(mask: Tensor, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * mask.to(output)


def _scaled_output(share: float | Tensor, _: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """Attention gives its weights as well."""
    if isinstance(output, tuple):
        return (output[0] * share, *output[1:])
    return output * share


@contextmanager
def _experts_left_out(gate: nn.Module, mask: Tensor) -> Iterator[None]:
    """Routing without the experts whose mask is 0, by their selection bias; the others' weights times their masks."""

    def weigh(_: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = output
        weights = weights * mask.to(weights)[indices]
        if gate.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
        return logits, weights, indices

    bias = gate.e_score_correction_bias
    gate.e_score_correction_bias = bias.masked_fill(mask.to(bias.device) == 0, -torch.inf)
    try:
        with gate.register_forward_hook(weigh):
            yield
    finally:
        gate.e_score_correction_bias = bias
