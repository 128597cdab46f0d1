"""The model and the tokenizer that `ModelArguments` name, ready to be trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import require
from ..inputs import load_tokenizer as open_tokenizer
from ..model.mtp import add_mtp
from .arguments import ModelArguments, as_mapping, nearest
from .fp8 import convert_to_fp8, print_fp8_modules
from .one_copy import device_to_load_on


def load_model(
    arguments: ModelArguments,
    default: str,
    from_preset: Callable[..., PreTrainedConfig],
    may_see: bool = False,
    **loading: object,
) -> PreTrainedModel:
    """The model, converted to FP8 if asked for; fresh weights depend on torch's seed. Without weights: see one_copy.py.

    Args:
        default: what `model` stands for when it is not given.
        from_preset: makes the configuration of a preset's name.
        may_see: whether the command trains vision-language models too.
        loading: more arguments of `from_pretrained`.

    Raises:
        ValueError: for a model that is not there or that the command does not train, or fields that the configuration does not
            have.
    """
    name, dtype, device = arguments.model or default, getattr(torch, arguments.dtype), device_to_load_on()
    if arguments.init == "random":
        config = load_config(name, from_preset, as_mapping(arguments.config_overrides, "config_overrides") or {})
        with torch.device(device) if device else nullcontext():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=arguments.attention)
    else:
        if arguments.config_overrides:
            raise ValueError(
                "config_overrides: allowed with --init random, a checkpoint's weights fit its own configuration"
            )
        how = {"dtype": dtype, "attn_implementation": arguments.attention, "device_map": device, **loading}
        model = load_weights(name, "model", may_see, **how)
    settle_mtp(model, arguments)
    model.set_mamba_implementation(arguments.mamba)
    if arguments.fp8:
        convert_to_fp8(model)
        print_fp8_modules(model)
    return model


def settle_mtp(model: PreTrainedModel, arguments: ModelArguments) -> None:
    """Add the fresh heads that `mtp_depth` asks for; it may also name those that the model has."""
    depth, config = arguments.mtp_depth, model.config.get_text_config()
    pattern = arguments.mtp_pattern
    require(pattern is None or depth is not None, "mtp_pattern", pattern, "none without mtp_depth")
    if depth is None:
        return
    require(config is model.config, "mtp_depth", depth, "none for a vision-language model")
    require(depth >= 1, "mtp_depth", depth, "1 or more")
    held = config.num_nextn_predict_layers
    require(held in (0, depth), "mtp_depth", depth, f"none, or the {held} that the model has")
    if held:
        own = config.mtp_hybrid_override_pattern
        require(pattern in (None, own), "mtp_pattern", pattern, f"none, or the model's {own!r}")
    else:
        add_mtp(model, depth, pattern)


def load_weights(name: str, field: str, may_see: bool = False, **loading: object) -> PreTrainedModel:
    """`from_pretrained`, whose OSError for what is not there becomes a ValueError that names the field."""
    try:
        config = AutoConfig.from_pretrained(name)
        allowed = "a text model; nemotron-h sft trains vision-language models"
        require(may_see or config.get_text_config() is config, field, name, allowed)
        return AutoModelForCausalLM.from_pretrained(name, **loading)
    except OSError as error:
        raise ValueError(f"{field}={name!r}: allowed is a checkpoint folder or a hub id ({error})") from error


def load_config(name: str, from_preset: Callable[..., PreTrainedConfig], overrides: dict) -> PreTrainedConfig:
    """The configuration of a folder, hub id or preset, with some of its fields replaced."""
    is_preset = not Path(name).is_dir() and "/" not in name
    try:
        base = from_preset(name) if is_preset else AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        allowed = "a checkpoint folder, a hub id or a preset"
        raise ValueError(f"model={name!r}: allowed with --init random is {allowed} ({error})") from error
    kept = base.to_dict()
    layers = {"layers_block_type", "hybrid_override_pattern"} & overrides.keys()
    for field in ("layers_block_type", "hybrid_override_pattern", "num_hidden_layers") if layers else ():
        kept.pop(field, None)  # the new layers say all three
    known = [*kept, *layers, *(item.name for item in fields(type(base)))]
    kept.pop("elastic", None)  # budgets describe weights, and these will be fresh
    for field in overrides:
        if field not in known:
            raise ValueError(
                f"config_overrides={field!r}: allowed are fields of the configuration{nearest(field, known)}"
            )
    return type(base).from_dict({**kept, **overrides})


def load_tokenizer(arguments: ModelArguments, default: str, vocab_size: int) -> Tokenizer:
    """The tokenizer, which may have no more tokens than the model.

    Raises:
        ValueError: if it has more, or no token that ends a document.
    """
    name = arguments.tokenizer or arguments.model or default
    try:
        tokenizer = open_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: none found in {name!r}; name one by --tokenizer ({error})") from None
    if len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer: {name} has {len(tokenizer)} tokens: allowed are the model's {vocab_size}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name} has no eos_token, which ends a document")
    return tokenizer
