"""What a configuration's fields may be: each is checked once, when it is made, and again before it is saved."""

from typing import Any

import torch
from transformers.activations import ACT2FN

from .block_configs import OPTIONAL

LAYER_NAMES = {"linear_attention": "Mamba", "full_attention": "attention", "mlp": "MLP", "moe": "MoE"}  # for people
LARGEST = 3.4028234663852886e38  # of fp32: stands for infinity in files whose lower limit is not 0
MAMBA_IMPLEMENTATIONS = ("auto", "torch", "kernels", "triton")


def check_fields(config: Any) -> None:
    """Raise a ValueError for the first field of a configuration that does not fit: its value, and what is allowed."""

    def require(condition: bool, field: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{field}={getattr(config, field)!r}: allowed is {allowed}")

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST  # NaN is not

    counts = ["vocab_size", "hidden_size", "max_position_embeddings", "num_key_value_heads", "head_dim",
              "ssm_state_size", "n_groups", "chunk_size"]  # fmt: skip
    if config.has_experts:
        counts += ["n_shared_experts", "n_group", "topk_group"]
    for field in counts:
        require(is_count(getattr(config, field)), field, "a positive integer")
    for field, kind in config.PER_LAYER_FIELDS.items():
        if kind != "moe" or config.has_experts:
            _check_sizes(config, field, kind)
    for field, divisor in (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups")):
        sizes, by = getattr(config, field), getattr(config, divisor)
        sizes = sizes if isinstance(sizes, list) else [sizes]
        require(all(size % by == 0 for size in sizes), field, f"a multiple of {divisor}={by}")
    require(is_count(config.conv_kernel) and config.conv_kernel > 1, "conv_kernel", "an integer of 2 or more")
    for field in ("layer_norm_epsilon", "initializer_range", "time_step_min", "time_step_max", "time_step_floor"):
        require(is_number(getattr(config, field)) and getattr(config, field) > 0, field, "a positive number")
    for field in ("attention_dropout", "hidden_dropout"):
        require(is_number(getattr(config, field)) and 0 <= getattr(config, field) < 1, field, "a number in [0, 1)")
    require(
        isinstance(config.mlp_hidden_act, str) and config.mlp_hidden_act in ACT2FN,
        "mlp_hidden_act",
        f"one of {', '.join(sorted(ACT2FN))}",
    )
    require(config.mamba_hidden_act in ("silu", "swish"), "mamba_hidden_act", "'silu' (or its other name 'swish')")
    require(
        config.mamba_implementation in MAMBA_IMPLEMENTATIONS, "mamba_implementation",
        f"one of {', '.join(MAMBA_IMPLEMENTATIONS)}",
    )  # fmt: skip
    mtp_depth = config.num_nextn_predict_layers
    require(mtp_depth == 0 or is_count(mtp_depth), "num_nextn_predict_layers", "a non-negative integer")
    if config.has_experts:
        require(config.topk_group <= config.n_group, "topk_group", f"at most n_group={config.n_group}")
        for layer in config.layers_with("moe"):
            _check_choice(config, layer)
        require(is_number(config.routed_scaling_factor), "routed_scaling_factor", "a number")


def is_count(value: Any) -> bool:
    """Whether it is a positive integer of 31 bits; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _check_sizes(config: Any, field: str, kind: str) -> None:
    """A count, or a list of counts, one for each layer of the kind; null where a field may have none."""
    sizes, name = getattr(config, field), LAYER_NAMES[kind]
    optional = field in OPTIONAL
    null = "null, " if optional else ""

    def is_size(value: Any) -> bool:
        return is_count(value) or (optional and value is None)

    if not isinstance(sizes, (list, tuple)):
        if not is_size(sizes):
            raise ValueError(
                f"{field}={sizes!r}: allowed is {null}a positive integer or a list of them, one per {name} layer"
            )
        return
    setattr(config, field, list(sizes))
    if not all(map(is_size, sizes)):
        raise ValueError(f"{field}={list(sizes)!r}: allowed is {null}an integer or a list of positive integers")
    count, mtp = config.layers_block_type.count(kind), (config.mtp_layers_block_type or []).count(kind)
    if len(sizes) not in (count, count + mtp):
        more = f" and {mtp} more for multi-token prediction" if mtp else ""
        raise ValueError(
            f"{field}={list(sizes)!r} has {len(sizes)} entries: allowed is one per {name} layer; the pattern has {count} of "
            f"them{more}"
        )


def _check_choice(config: Any, layer: int) -> None:
    """That a layer's router can choose as many experts as it shall."""
    experts, top_k = (config.size(field, layer) for field in ("n_routed_experts", "num_experts_per_tok"))
    differs = any(isinstance(getattr(config, field), list) for field in ("n_routed_experts", "num_experts_per_tok"))
    place = f" in layer {layer}" if differs else ""
    reach = experts // config.n_group * config.topk_group
    if top_k > experts:
        raise ValueError(f"num_experts_per_tok={top_k}{place}: allowed is at most n_routed_experts={experts}")
    if experts % config.n_group:
        raise ValueError(f"n_group={config.n_group}{place}: allowed is a divisor of n_routed_experts={experts}")
    if top_k > reach:
        raise ValueError(
            f"num_experts_per_tok={top_k}{place}: allowed is at most the {reach} experts of topk_group={config.topk_group} "
            "groups"
        )


def check_token_ids(config: Any) -> None:
    """Raise a ValueError for token ids that are no whole numbers; the ends of a text may be several."""
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, field)
        several = value if isinstance(value, list) and field == "eos_token_id" else [value]
        if not all(it is None or (isinstance(it, int) and not isinstance(it, bool)) for it in several):
            raise ValueError(f"{field}={value!r}: allowed is a token's number")


def check_dtype(dtype: Any) -> None:
    """Raise a ValueError for what is no dtype: transformers looks up any name in torch."""
    known = dtype is None or isinstance(getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype,
                                        torch.dtype)  # fmt: skip
    if not known and dtype != "auto":
        raise ValueError(f"dtype={dtype!r}: allowed are the names of PyTorch's dtypes, such as bfloat16")
