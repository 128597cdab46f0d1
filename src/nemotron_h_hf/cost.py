"""What a Nemotron-H configuration costs: parameters, checkpoint tensors, bytes on disk and bytes per sequence.

Everything is derived from one list: the tensors of a checkpoint as the released files hold them (one matrix per
expert, `mtp.*` included). Nothing is allocated, so a 550B model is counted in milliseconds.

    per layer   d hidden, i = heads x head_dim of Mamba, c = i + 2 x groups x state (what the convolution sees)
    M  Mamba-2    in_proj d x (i + c + heads), conv c x kernel, A_log/D/dt_bias heads, gated norm i, out_proj i x d
    *  attention  q, k, v, o
    -  MLP        up and down, one width per MLP layer
    E  MoE        router, its correction bias, routed experts, shared expert, and two projections when latent
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .model.configuration_nemotron_h import NemotronHConfig

BYTES_PER_ELEMENT = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "nvfp4": 0.5625,
    "fp4": 0.5,
}
"""Stored bytes of one element, by torch's name of the dtype; nvfp4 has a scale of one byte for every 16 elements."""

KINDS = (
    "embeddings",
    "lm_head",
    "norms",
    "mamba",
    "attention",
    "mlp",
    "moe_router",
    "moe_latent",
    "moe_routed",
    "moe_shared",
    "mtp",
)
"""The kinds that parameters are counted by. `mtp` is all of the multi-token-prediction block, its norms included."""


class WeightShape(NamedTuple):
    """One tensor of a checkpoint, or `copies` alike ones (`{e}` in the name is the expert's number)."""

    name: str
    shape: tuple[int, ...]
    kind: str
    copies: int = 1

    @property
    def num_elements(self) -> int:
        """Elements over all copies."""
        return math.prod(self.shape) * self.copies


def checkpoint_tensors(config: NemotronHConfig) -> Iterator[WeightShape]:
    """Every tensor of a released-style checkpoint of `config`, in order of depth."""
    yield WeightShape("backbone.embeddings.weight", (config.vocab_size, config.hidden_size), "embeddings")
    yield from _stack(config)
    yield WeightShape("backbone.norm_f.weight", (config.hidden_size,), "norms")
    if not config.tie_word_embeddings:
        yield WeightShape("lm_head.weight", (config.vocab_size, config.hidden_size), "lm_head")
    yield from _mtp(config)


def parameters_by_kind(config: NemotronHConfig) -> dict[str, int]:
    """Exact number of stored elements of each kind in `KINDS`, the router's correction bias included."""
    counts = Counter({kind: 0 for kind in KINDS})
    for tensor in checkpoint_tensors(config):
        counts[tensor.kind] += tensor.num_elements
    return dict(counts)


def num_parameters(config: NemotronHConfig, with_mtp: bool = True) -> int:
    """Exact number of stored elements; `with_mtp=False` counts the main stack alone."""
    counts = parameters_by_kind(config)
    return sum(counts.values()) - (0 if with_mtp else counts["mtp"])


def num_active_parameters(config: NemotronHConfig) -> int:
    """Parameters of the main stack that one token uses: all but the routed experts it is not sent to."""
    routed = parameters_by_kind(config)["moe_routed"]
    if routed == 0:
        return num_parameters(config, with_mtp=False)
    unused = routed // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    return num_parameters(config, with_mtp=False) - unused


def num_checkpoint_tensors(config: NemotronHConfig) -> int:
    """Tensors in a released-style checkpoint, where each expert has its own matrices."""
    return sum(tensor.copies for tensor in checkpoint_tensors(config))


def weight_bytes(config: NemotronHConfig, dtype: str = "bfloat16") -> int:
    """Bytes of all weights stored in `dtype`; the router's correction bias is float32 in every release."""
    return math.ceil(sum(stored_bytes(tensor, dtype) for tensor in checkpoint_tensors(config)))


def stored_bytes(tensor: WeightShape, dtype: str) -> float:
    """Bytes of one tensor (and its copies) of a checkpoint in `dtype`."""
    in_float32 = tensor.name.endswith("e_score_correction_bias")
    return tensor.num_elements * (4 if in_float32 else bytes_per_element(dtype))


def layer_of(config: NemotronHConfig, tensor: WeightShape) -> int | str | None:
    """The layer of the stack that a tensor belongs to; of multi-token prediction the layer's kind; else None."""
    match = re.match(r"(mtp|backbone)\.layers\.(\d+)\.", tensor.name)
    if match is None:
        return None
    index = int(match[2])
    return index if match[1] == "backbone" else config.mtp_layers_block_type[index % len(config.mtp_layers_block_type)]


def kv_bytes_per_token(config: NemotronHConfig, dtype: str = "bfloat16") -> int:
    """Bytes that every further token adds to one sequence's cache: keys and values of the attention layers."""
    layers = layers_of_kind(config, "full_attention")
    return sum(layer_cache_bytes(config, index, 1, dtype) for index in layers)


def ssm_state_bytes(config: NemotronHConfig, dtype: str = "float32") -> int:
    """Bytes of the recurrent state (heads x head_dim x state per Mamba layer) of one sequence of any length."""
    width = sum(map(config.mamba_width, layers_of_kind(config, "linear_attention")))
    return width * config.ssm_state_size * bytes_per_element(dtype)


def conv_state_bytes(config: NemotronHConfig, dtype: str = "bfloat16") -> int:
    """Bytes of the convolution windows (conv_dim x kernel per Mamba layer) of one sequence of any length."""
    channels = sum(map(config.conv_width, layers_of_kind(config, "linear_attention")))
    return channels * config.conv_kernel * bytes_per_element(dtype)


def cache_bytes(config: NemotronHConfig, num_tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes of one sequence's whole cache after `num_tokens`, the recurrent state in float32."""
    return sum(layer_cache_bytes(config, index, num_tokens, dtype) for index in range(config.num_hidden_layers))


def layer_cache_bytes(config: NemotronHConfig, index: int, num_tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes that layer `index` of the stack keeps of one sequence after `num_tokens`."""
    if num_tokens < 0:
        raise ValueError(f"num_tokens is {num_tokens}; it must be 0 or more")
    kind = config.layers_block_type[index]
    if kind == "full_attention":
        return 2 * num_tokens * config.num_key_value_heads * config.head_dim * bytes_per_element(dtype)
    if kind == "linear_attention":
        state = config.mamba_width(index) * config.ssm_state_size * bytes_per_element("float32")
        return state + config.conv_width(index) * config.conv_kernel * bytes_per_element(dtype)
    return 0


def forward_flops_per_token(config: NemotronHConfig, sequence_length: int, first_layer: int = 0) -> dict[str, float]:
    """Floating-point operations of the forward pass, by part, for each token of a row of `sequence_length` (l) tokens.

    A multiplication with an addition counts as two. MTP, norms and activations are not counted, nor are layers below
    `first_layer`.

        linear     2 x elements of every matrix that a token meets: routed experts by num_experts_per_tok, and lm_head
        attention  2 products x 2 x heads x head_dim x (l + 1) / 2 tokens seen on average, per layer
        scan       in chunks of q tokens: C B^T and its product with x, 2q (groups x state + heads x head_dim); into the
                   state and out of it, 4 x heads x head_dim x state; per layer
        conv       2 x channels x taps, per layer
    """
    mamba, attention = (
        [index for index in layers_of_kind(config, kind) if index >= first_layer]
        for kind in ("linear_attention", "full_attention")
    )
    inner, state = sum(map(config.mamba_width, mamba)), config.ssm_state_size  # of all layers
    heads = sum(config.size("num_attention_heads", index) for index in attention)
    chunk = min(config.chunk_size, sequence_length)
    return {
        "linear": 2 * _matrix_elements_per_token(config, first_layer),
        "attention": 2 * heads * config.head_dim * (sequence_length + 1),
        "scan": 2 * chunk * (len(mamba) * config.n_groups * state + inner) + 4 * inner * state,
        "conv": 2 * sum(map(config.conv_width, mamba)) * config.conv_kernel,
    }


def training_flops_per_token(config: NemotronHConfig, sequence_length: int) -> float:
    """Forward, and twice as much backward; what is computed again to save memory does not count (as in MFU)."""
    return 3 * sum(forward_flops_per_token(config, sequence_length).values())


def adapter_training_flops_per_token(
    config: NemotronHConfig, sequence_length: int, adapter_elements: float, first_layer: int = 0
) -> float:
    """As `training_flops_per_token`, of adapters (LoRA) on frozen weights.

    A frozen weight has no gradient, so going backward through it costs as much as going forward; attention and scan
    multiply activations with each other and cost twice as much, as usual. Nothing goes backward below the adapters.

    Args:
        adapter_elements: of the adapters' matrices, those that each token is multiplied with.
        first_layer: the lowest layer with an adapter; all of its backward is counted.
    """
    forward = sum(forward_flops_per_token(config, sequence_length).values())
    above = forward_flops_per_token(config, sequence_length, first_layer)
    backward = above["linear"] + above["conv"] + 2 * (above["attention"] + above["scan"])
    return forward + backward + 3 * 2 * adapter_elements


def _matrix_elements_per_token(config: NemotronHConfig, first_layer: int) -> float:
    """Elements of the matrices of the main stack, from that layer on, that each token is multiplied with."""
    elements = config.vocab_size * config.hidden_size  # lm_head, tied or not
    for tensor in _stack(config):
        if len(tensor.shape) == 2 and layer_of(config, tensor) >= first_layer:
            used = config.num_experts_per_tok / config.n_routed_experts if tensor.kind == "moe_routed" else 1
            elements += tensor.num_elements * used
    return elements


def bytes_per_element(dtype: str) -> float:
    """Bytes of one element of `dtype`, named as in torch but without `torch.`."""
    if dtype not in BYTES_PER_ELEMENT:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(BYTES_PER_ELEMENT)}")
    return BYTES_PER_ELEMENT[dtype]


def layers_of_kind(config: NemotronHConfig, kind: str) -> list[int]:
    """Indices of the layers of the main stack with that mixer (as in `layers_block_type`)."""
    return [index for index, found in enumerate(config.layers_block_type) if found == kind]


def _stack(config: NemotronHConfig) -> Iterator[WeightShape]:
    for index, block_type in enumerate(config.layers_block_type):
        prefix = f"backbone.layers.{index}."
        yield WeightShape(prefix + "norm.weight", (config.hidden_size,), "norms")
        yield from _mixer(config, block_type, prefix + "mixer.", index)


def _mixer(config: NemotronHConfig, block_type: str, prefix: str, index: int) -> Iterator[WeightShape]:
    if block_type == "linear_attention":
        yield from _mamba(config, prefix, index)
    elif block_type == "full_attention":
        yield from _attention(config, prefix, index)
    elif block_type == "mlp":
        mlp_width = config.size("intermediate_size", index)
        yield from _linear(prefix + "up_proj", config.hidden_size, mlp_width, config.mlp_bias, "mlp")
        yield from _linear(prefix + "down_proj", mlp_width, config.hidden_size, config.mlp_bias, "mlp")
    else:
        yield from _moe(config, prefix)


def _linear(name: str, num_in: int, num_out: int, bias: bool, kind: str) -> Iterator[WeightShape]:
    yield WeightShape(f"{name}.weight", (num_out, num_in), kind)
    if bias:
        yield WeightShape(f"{name}.bias", (num_out,), kind)


def _mamba(config: NemotronHConfig, prefix: str, index: int) -> Iterator[WeightShape]:
    inner, heads, channels = config.mamba_width(index), config.size("mamba_num_heads", index), config.conv_width(index)
    num_in_proj = inner + channels + heads  # gate, what the convolution sees, dt
    yield from _linear(prefix + "in_proj", config.hidden_size, num_in_proj, config.use_bias, "mamba")
    yield WeightShape(prefix + "conv1d.weight", (channels, 1, config.conv_kernel), "mamba")
    if config.use_conv_bias:
        yield WeightShape(prefix + "conv1d.bias", (channels,), "mamba")
    for name in ("A_log", "D", "dt_bias"):
        yield WeightShape(prefix + name, (heads,), "mamba")
    yield WeightShape(prefix + "norm.weight", (inner,), "mamba")
    yield from _linear(prefix + "out_proj", inner, config.hidden_size, config.use_bias, "mamba")


def _attention(config: NemotronHConfig, prefix: str, index: int) -> Iterator[WeightShape]:
    hidden, bias = config.hidden_size, config.attention_bias
    query = config.size("num_attention_heads", index) * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    yield from _linear(prefix + "q_proj", hidden, query, bias, "attention")
    yield from _linear(prefix + "k_proj", hidden, key_value, bias, "attention")
    yield from _linear(prefix + "v_proj", hidden, key_value, bias, "attention")
    yield from _linear(prefix + "o_proj", query, hidden, bias, "attention")


def _moe(config: NemotronHConfig, prefix: str) -> Iterator[WeightShape]:
    hidden, experts, bias = config.hidden_size, config.n_routed_experts, config.mlp_bias
    yield WeightShape(prefix + "gate.weight", (experts, hidden), "moe_router")
    yield WeightShape(prefix + "gate.e_score_correction_bias", (experts,), "moe_router")
    width, latent = config.moe_intermediate_size, config.moe_latent_size
    size = latent or hidden
    yield WeightShape(prefix + "experts.{e}.up_proj.weight", (width, size), "moe_routed", experts)
    yield WeightShape(prefix + "experts.{e}.down_proj.weight", (size, width), "moe_routed", experts)
    if latent:
        yield from _linear(prefix + "fc1_latent_proj", hidden, latent, bias, "moe_latent")
        yield from _linear(prefix + "fc2_latent_proj", latent, hidden, bias, "moe_latent")
    shared = config.moe_shared_expert_intermediate_size
    yield from _linear(prefix + "shared_experts.up_proj", hidden, shared, bias, "moe_shared")
    yield from _linear(prefix + "shared_experts.down_proj", shared, hidden, bias, "moe_shared")


def _mtp(config: NemotronHConfig) -> Iterator[WeightShape]:
    """The multi-token-prediction blocks: each joins embedding and hidden state, runs its layers, and norms."""
    for step in range(config.num_nextn_predict_layers):
        block_types = config.mtp_layers_block_type
        for inner, block_type in enumerate(block_types):
            prefix = f"mtp.layers.{step * len(block_types) + inner}."
            for name, shape in _mtp_extras(config, first=inner == 0, last=inner == len(block_types) - 1):
                yield WeightShape(prefix + name, shape, "mtp")
            yield WeightShape(prefix + "norm.weight", (config.hidden_size,), "mtp")
            for tensor in _mixer(config, block_type, prefix + "mixer.", config.num_hidden_layers + inner):
                yield tensor._replace(kind="mtp")


def _mtp_extras(config: NemotronHConfig, first: bool, last: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config.hidden_size
    if first:
        yield "eh_proj.weight", (hidden, 2 * hidden)
        yield "enorm.weight", (hidden,)
        yield "hnorm.weight", (hidden,)
    if last:
        yield "final_layernorm.weight", (hidden,)
