"""What a Nemotron-H configuration costs: parameters, checkpoint tensors, bytes on disk and bytes per sequence.

Everything is derived from one list: the tensors of a checkpoint as the released files hold them (one matrix per
expert, `mtp.*` included; tensors.py). Nothing is allocated, so a 550B model is counted in milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from .model.configuration_nemotron_h import NemotronHConfig
from .tensors import WeightShape, checkpoint_tensors, size

BYTES_PER_ELEMENT = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "nvfp4": 0.5625,
                     "fp4": 0.5}  # fmt: skip
"""Stored bytes of one element, by torch's name of the dtype; nvfp4 has a scale of one byte for every 16 elements."""

KINDS = ("embeddings", "lm_head", "norms", "mamba", "attention", "mlp", "moe_router", "moe_latent", "moe_routed",
         "moe_shared", "mtp")  # fmt: skip
"""The kinds that parameters are counted by. `mtp` is all of the multi-token-prediction block, its norms included."""


def parameters_by_kind(config: NemotronHConfig) -> dict[str, int]:
    """Exact number of stored elements of each kind in `KINDS`, the router's correction bias included."""
    counts = Counter({kind: 0 for kind in KINDS})
    for tensor in checkpoint_tensors(config):
        counts[tensor.kind] += tensor.num_elements
    return dict(counts)


def parameters_by_layer(config: NemotronHConfig) -> list[int]:
    """Exact number of stored elements of each layer of the stack, then of each layer of multi-token prediction."""
    mtp = len(config.mtp_layers_block_type or ()) * config.num_nextn_predict_layers
    counts = [0] * (config.num_hidden_layers + mtp)
    for tensor in checkpoint_tensors(config):
        if (number := tensor.place.layer) is not None:
            counts[number + config.num_hidden_layers * (tensor.place.root == "mtp")] += tensor.num_elements
    return counts


def num_parameters(config: NemotronHConfig, with_mtp: bool = True) -> int:
    """Exact number of stored elements; `with_mtp=False` counts the main stack alone."""
    counts = parameters_by_kind(config)
    return sum(counts.values()) - (0 if with_mtp else counts["mtp"])


def num_active_parameters(config: NemotronHConfig) -> int:
    """Parameters of the main stack that one token uses: all but the routed experts it is not sent to."""
    return sum(elements_per_token(config, tensor) for tensor in checkpoint_tensors(config) if tensor.kind != "mtp")


def num_checkpoint_tensors(config: NemotronHConfig) -> int:
    """Tensors in a released-style checkpoint, where each expert has its own matrices."""
    return sum(tensor.copies for tensor in checkpoint_tensors(config))


def weight_bytes(config: NemotronHConfig, dtype: str = "bfloat16") -> int:
    """Bytes of all weights stored in `dtype`; the router's correction bias is float32 in every release."""
    return math.ceil(sum(stored_bytes(tensor, dtype) for tensor in checkpoint_tensors(config)))


def stored_bytes(tensor: WeightShape, dtype: str) -> float:
    """Bytes of one tensor (and its copies) of a checkpoint in `dtype`."""
    return tensor.num_elements * (4 if tensor.in_float32 else bytes_per_element(dtype))


class CacheElements(NamedTuple):
    """What a layer keeps of one sequence: keys and values of each token; recurrent state and convolution window of all."""

    kv: int = 0
    state: int = 0
    conv: int = 0


def cache_elements(config: NemotronHConfig, layer: int) -> CacheElements:
    """Elements that a layer of the stack keeps."""
    kind = config.layers_block_type[layer]
    if kind == "full_attention":
        return CacheElements(kv=2 * config.num_key_value_heads * config.head_dim)
    if kind == "linear_attention":
        state = config.mamba_width(layer) * config.ssm_state_size
        return CacheElements(state=state, conv=config.conv_width(layer) * config.conv_kernel)
    return CacheElements()


def kv_bytes_per_token(config: NemotronHConfig, dtype: str = "bfloat16") -> int:
    """Bytes that every further token adds to one sequence's cache: keys and values of the attention layers."""
    return _cached(config, "kv") * bytes_per_element(dtype)


def ssm_state_bytes(config: NemotronHConfig, dtype: str = "float32") -> int:
    """Bytes of the recurrent state (heads x head_dim x state per Mamba layer) of one sequence of any length."""
    return _cached(config, "state") * bytes_per_element(dtype)


def conv_state_bytes(config: NemotronHConfig, dtype: str = "bfloat16") -> int:
    """Bytes of the convolution windows (conv_dim x kernel per Mamba layer) of one sequence of any length."""
    return _cached(config, "conv") * bytes_per_element(dtype)


def _cached(config: NemotronHConfig, part: str) -> int:
    return sum(getattr(cache_elements(config, layer), part) for layer in range(config.num_hidden_layers))


def cache_bytes(config: NemotronHConfig, num_tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes of one sequence's whole cache after `num_tokens`, the recurrent state in float32."""
    return sum(layer_cache_bytes(config, layer, num_tokens, dtype) for layer in range(config.num_hidden_layers))


def layer_cache_bytes(config: NemotronHConfig, layer: int, num_tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes that a layer of the stack keeps of one sequence after `num_tokens`."""
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens}: allowed is 0 or more")
    kept = cache_elements(config, layer)
    return 4 * kept.state + (num_tokens * kept.kv + kept.conv) * bytes_per_element(dtype)


def forward_flops_per_token(config: NemotronHConfig, sequence_length: int, first_layer: int = 0) -> dict[str, float]:
    """Floating-point operations of the forward pass, by part, for each token of a row of `sequence_length` (l) tokens.

    A multiplication with an addition counts as two. MTP, norms and activations are not counted, nor are layers below
    `first_layer`.

        linear     2 x elements of every matrix that a token meets: routed experts by num_experts_per_tok, and lm_head
        attention  2 products x 2 x heads x head_dim x tokens seen on average ((l + 1) / 2 without a window), per layer
        scan       in chunks of q tokens: C B^T and its product with x, 2q (groups x state + heads x head_dim); into the
                   state and out of it, 4 x heads x head_dim x state; per layer
        conv       2 x channels x taps, per layer
    """
    mamba, attention = (
        [index for index in layers_of_kind(config, kind) if index >= first_layer]
        for kind in ("linear_attention", "full_attention")
    )
    inner, state = sum(map(config.mamba_width, mamba)), config.ssm_state_size  # of all layers
    seen = sum(
        config.size("num_attention_heads", index) * tokens_seen(sequence_length, config.size("sliding_window", index))
        for index in attention
    )
    chunk = min(config.chunk_size, sequence_length)
    return {
        "linear": 2 * _matrix_elements_per_token(config, first_layer),
        "attention": 4 * config.head_dim * seen,
        "scan": 2 * chunk * (len(mamba) * config.n_groups * state + inner) + 4 * inner * state,
        "conv": 2 * sum(map(config.conv_width, mamba)) * config.conv_kernel,
    }


def tokens_seen(sequence_length: int, window: int | None) -> float:
    """Tokens that one of a row attends to, itself included, on average."""
    window = sequence_length if window is None else min(window, sequence_length)
    return window * (2 * sequence_length - window + 1) / (2 * sequence_length)


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


def _matrix_elements_per_token(config: NemotronHConfig, first_layer: int) -> int:
    """Elements of the matrices of the main stack, from that layer on, that each token is multiplied with."""
    lm_head = config.vocab_size * config.hidden_size  # tied or not
    return lm_head + sum(
        elements_per_token(config, tensor)
        for tensor in checkpoint_tensors(config)
        if len(tensor.shape) == 2 and (tensor.stack_layer if tensor.stack_layer is not None else -1) >= first_layer
    )


def elements_per_token(config: NemotronHConfig, tensor: WeightShape) -> int:
    """Elements of a tensor that one token meets: of the routed experts those of the ones it is sent to."""
    if tensor.kind != "moe_routed":
        return tensor.num_elements
    return math.prod(tensor.shape) * size(config, "num_experts_per_tok", tensor.layer)


def bytes_per_element(dtype: str) -> float:
    """Bytes of one element of `dtype`, named as in torch but without `torch.`."""
    if dtype not in BYTES_PER_ELEMENT:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(BYTES_PER_ELEMENT)}")
    return BYTES_PER_ELEMENT[dtype]


def layers_of_kind(config: NemotronHConfig, kind: str) -> list[int]:
    """Indices of the layers of the main stack with that mixer (as in `layers_block_type`)."""
    return [index for index, found in enumerate(config.layers_block_type) if found == kind]
