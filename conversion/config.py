"""The configuration of a Megatron checkpoint: from its arguments, its names and shapes, and what the user adds.

There are three sources: the training arguments, the tensors themselves (how many layers, of which kinds and sizes), and
`--config`. A field is taken from any source that has it; if two have it and differ, that is an error that names both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from nemotron_h_hf.inputs import read_json
from nemotron_h_hf.model.block_configs import unpack_blocks
from nemotron_h_hf.model.configuration_nemotron_h import SYNONYMS, NemotronHConfig

from .source_checkpoint import SourceCheckpoint, naming

# argument (and its other spellings) -> field of the configuration
FIELDS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
    "mamba_chunk_size": "chunk_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "layer_norm_epsilon",
    "norm_epsilon": "layer_norm_epsilon",
    "num_experts": "n_routed_experts",
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_latent_size": "moe_latent_size",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
}
OTHER_SPELLINGS = ("norm_epsilon", "num_moe_experts")
MOE_ONLY = {
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size", "routed_scaling_factor", "n_group", "topk_group",
}  # fmt: skip
FRACTIONS = {"layer_norm_epsilon", "routed_scaling_factor"}
# argument -> the only values that the architecture has; anything else would be converted into another model
REQUIRED = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("none", "learned_absolute"),  # the latter is Megatron's default and shows as a tensor
    "swiglu": (False,),
    "gated_linear_unit": (False,),
    "quick_geglu": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "multi_latent_attention": (False,),
    "qk_layernorm": (False,),
    "attention_output_gate": (False,),
    "moe_shared_expert_gate": (False,),
}
REQUIRED_WITH_EXPERTS = {"moe_router_score_function": ("sigmoid",), "moe_router_pre_softmax": (False,)}
REQUIRED_WITH_MLP = {"squared_relu": (True,)}
GATED_NORM_EPSILON = 1e-5  # a constant of Megatron's Mamba layers
NEEDED = (
    "n_groups", "ssm_state_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok",
)  # fmt: skip


class Known(NamedTuple):
    """A value and who says so."""

    value: Any
    source: str


def derive(
    checkpoint: SourceCheckpoint, extra: str | Path | dict[str, Any] | None = None
) -> tuple[NemotronHConfig, list[str]]:
    """The configuration of a Megatron checkpoint, and remarks on what was not given.

    `extra` is a preset's name, the path of a config.json (or its folder), or what such a file has.

    Raises:
        ValueError: when witnesses disagree, naming both, or when a field is unknown to all; it names the checkpoint.
    """
    with naming(checkpoint.path):
        return _derive(checkpoint, extra)


def _derive(
    checkpoint: SourceCheckpoint, extra: str | Path | dict[str, Any] | None
) -> tuple[NemotronHConfig, list[str]]:
    args = checkpoint.args
    known: dict[str, Known] = {}
    _merge(known, from_tensors(checkpoint))
    pattern = known["hybrid_override_pattern"].value
    _refuse_other_architectures(args, pattern + known["mtp_hybrid_override_pattern"].value)
    _merge(known, from_args(args, known))
    added = read_extra(extra) if extra is not None else {}
    _merge(
        known,
        {
            field: Known(value, "--config" if isinstance(extra, dict) else f"--config {extra}")
            for field, value in added.items()
        },
        fill_only=NOT_COMPARED,
    )
    fields = {field: item.value for field, item in known.items()}
    _complete_attention(fields, known)
    remarks = _complete_vocabulary(fields, checkpoint)
    for field in NEEDED:
        needs = {"num_experts_per_tok": "E", "n_groups": "M", "ssm_state_size": "M"}.get(field, "*")
        if field not in fields and needs in pattern + fields["mtp_hybrid_override_pattern"]:
            raise ValueError(
                f"{field} is in neither the arguments of {checkpoint.path} nor its shapes; give it by --config"
            )
    silent = [field for field in ("layer_norm_epsilon", "max_position_embeddings", "chunk_size") if field not in fields]
    if silent:
        remarks.append(f"not in the checkpoint, so the defaults of the family: {', '.join(silent)}")
    fields.pop("gs", None)
    dtypes = {str(entry.dtype).removeprefix("torch.") for entry in checkpoint.entries.values() if len(entry.shape) > 1}
    config = NemotronHConfig(
        **fields, architectures=["NemotronHForCausalLM"], dtype=sorted(dtypes)[0] if dtypes else None
    )
    _check_product(config, known)
    if other := other_groups(config):
        remarks.append(f"the weights are the same, the choice of experts is not: {other}")
    if "M" in pattern and config.layer_norm_epsilon != GATED_NORM_EPSILON:
        remarks.append(
            f"Megatron's gated norms have an epsilon of {GATED_NORM_EPSILON}; in Hugging Face they share "
            f"layer_norm_epsilon={config.layer_norm_epsilon}"
        )
    return config, remarks


# In `--config` these may differ from the checkpoint's own: they are not part of the weights.
NOT_COMPARED = {"max_position_embeddings", "chunk_size"}


def _merge(known: dict[str, Known], more: dict[str, Known], fill_only: set[str] = frozenset()) -> None:
    for field, item in more.items():
        if field not in known:
            known[field] = item
        elif known[field].value != item.value and field not in fill_only:
            raise ValueError(
                f"{field} is {known[field].value!r} by {known[field].source}, but {item.value!r} by {item.source}"
            )


def from_tensors(checkpoint: SourceCheckpoint) -> dict[str, Known]:
    """What names and shapes say: the pattern and all sizes that are a whole axis of some tensor."""
    layers, mtp = _block_names(checkpoint)
    pattern = "".join(_letter(names, f"decoder.layers.{layer}") for layer, names in enumerate(layers))
    known = {
        "hybrid_override_pattern": Known(pattern, "the names of its layers"),
        "tie_word_embeddings": Known("output_layer.weight" not in checkpoint, "whether output_layer.weight is there"),
        "num_nextn_predict_layers": Known(len(mtp), "the names of its mtp.layers"),
    }
    patterns = {
        "".join(_letter(names, f"mtp.layers.{d}, layer {i}") for i, names in enumerate(m)) for d, m in enumerate(mtp)
    }
    if len(patterns) > 1:
        raise ValueError(f"the depths of multi-token prediction have different layers: {sorted(patterns)}")
    known["mtp_hybrid_override_pattern"] = Known(patterns.pop() if patterns else "", "the names of its mtp.layers")
    shapes: dict[str, dict[Any, str]] = {}
    widths = []
    experts: dict[str, dict[int, str]] = {}  # by layer
    for name, entry in checkpoint.entries.items():
        if (match := EXPERT_WIDTH.fullmatch(name)) and entry.shape:
            experts.setdefault(match[1], {}).setdefault(entry.shape[0], name)
        for regex, field, axis in MEASURES:
            if regex.search(name) and len(entry.shape) > axis:
                shapes.setdefault(field, {}).setdefault(entry.shape[axis], name)
        if re.fullmatch(r"decoder\.layers\.\d+\.mlp\.linear_fc1\.weight", name):
            widths.append((int(name.split(".")[2]), entry.shape[0]))
    for field, values in shapes.items():
        if len(values) > 1:
            both = " and ".join(f"{value} ({name})" for value, name in list(values.items())[:2])
            raise ValueError(f"{field} differs between tensors: {both}")
        known[field] = next(Known(value, f"the shape of {name}") for value, name in values.items())
    if experts:
        known["moe_intermediate_size"] = _expert_widths(experts)
    if widths:
        per_layer = [width for _, width in sorted(widths)]
        uniform = len(set(per_layer)) == 1
        known["intermediate_size"] = Known(
            per_layer[0] if uniform else per_layer, "the shapes of mlp.linear_fc1.weight"
        )
    for field, name in (("attention_bias", "self_attention.linear_qkv.bias"), ("mlp_bias", "mlp.linear_fc1.bias"),
                        ("use_bias", "mixer.in_proj.bias"), ("use_conv_bias", "mixer.conv1d.bias")):  # fmt: skip
        known[field] = Known(any(key.endswith(name) for key in checkpoint.entries), f"whether {name} is there")
    if "conv_rows" in known and "mamba_width" in known:
        rows, width = known.pop("conv_rows"), known["mamba_width"]
        known["gs"] = Known((rows.value - width.value) // 2, rows.source)
    if "mamba_width" in known and "mamba_num_heads" in known:
        width, heads = known.pop("mamba_width"), known["mamba_num_heads"]
        if width.value % heads.value:
            raise ValueError(f"{width.source} gives a Mamba width of {width.value}, {heads.source} {heads.value} heads")
        known["mamba_head_dim"] = Known(width.value // heads.value, f"{width.source} and {heads.source}")
    if "E" in pattern + known["mtp_hybrid_override_pattern"].value:
        known.setdefault("moe_latent_size", Known(None, "the absence of mlp.fc1_latent_proj"))
    return known


_BLOCK = r"\.layers\.\d+\."
MEASURES = tuple(
    (re.compile(pattern), field, axis)
    for pattern, field, axis in (
        (r"^embedding\.word_embeddings\.weight$|^output_layer\.weight$", "hidden_size", 1),
        (r"^embedding\.word_embeddings\.weight$|^output_layer\.weight$", "padded_rows", 0),
        (_BLOCK + r"mixer\.A_log$", "mamba_num_heads", 0),
        (_BLOCK + r"mixer\.norm\.weight$", "mamba_width", 0),
        (_BLOCK + r"mixer\.conv1d\.weight$", "conv_rows", 0),
        (_BLOCK + r"mixer\.conv1d\.weight$", "conv_kernel", 2),
        (_BLOCK + r"self_attention\.linear_proj\.weight$", "query_width", 1),
        (_BLOCK + r"self_attention\.linear_qkv\.weight$", "qkv_rows", 0),
        (_BLOCK + r"mlp\.router\.weight$", "n_routed_experts", 0),
        (_BLOCK + r"mlp\.shared_experts\.linear_fc1\.weight$", "moe_shared_expert_intermediate_size", 0),
        (_BLOCK + r"mlp\.fc1_latent_proj\.weight$", "moe_latent_size", 0),
    )
)


EXPERT_WIDTH = re.compile(
    r"((?:decoder\.layers\.\d+|mtp\.layers\.\d+\.mtp_model_layer\.layers\.\d+)\.)mlp\.experts\.linear_fc1\.weight\d+"
)


def _expert_widths(experts: dict[str, dict[int, str]]) -> Known:
    """The width of all experts, or a list of each layer's, those of multi-token prediction (all depths alike) last."""
    widths: dict[tuple, dict[int, str]] = {}
    for place, found in experts.items():
        numbers = [int(number) for number in re.findall(r"\d+", place)]
        widths.setdefault((place.startswith("mtp."), numbers[-1]), {}).update(found)
    for found in widths.values():
        if len(found) > 1:
            both = " and ".join(f"{width} ({name})" for width, name in list(found.items())[:2])
            raise ValueError(f"moe_intermediate_size differs between tensors of a layer: {both}")
    return Known(_one_or_all([next(iter(found)) for _, found in sorted(widths.items())]), "the shapes of mlp.experts")


def _one_or_all(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _block_names(checkpoint: SourceCheckpoint) -> tuple[list[set[str]], list[list[set[str]]]]:
    """Names within each layer, and within each layer of each depth of multi-token prediction."""
    layers: dict[int, set[str]] = {}
    mtp: dict[int, dict[int, set[str]]] = {}
    for name in checkpoint.entries:
        if match := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
            layers.setdefault(int(match[1]), set()).add(match[2])
        elif match := re.match(r"mtp\.layers\.(\d+)\.mtp_model_layer\.layers\.(\d+)\.(.*)", name):
            mtp.setdefault(int(match[1]), {}).setdefault(int(match[2]), set()).add(match[3])
    _check_numbers("decoder.layers", layers)
    _check_numbers("mtp.layers", mtp)
    for depth, inner in mtp.items():
        _check_numbers(f"mtp.layers.{depth}.mtp_model_layer.layers", inner)
    return [layers[i] for i in range(len(layers))], [[mtp[d][i] for i in range(len(mtp[d]))] for d in range(len(mtp))]


def _check_numbers(what: str, found: dict[int, Any]) -> None:
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        raise ValueError(f"{what} has no tensors of number {missing[0]}, but of {max(found)}")


def _letter(names: set[str], where: str) -> str:
    """The kind of a layer by its names."""
    signs = {"M": "mixer.", "*": "self_attention.", "E": "mlp.router.", "-": "mlp.linear_fc1."}
    letters = [letter for letter, sign in signs.items() if any(name.startswith(sign) for name in names)]
    if len(letters) != 1:
        raise ValueError(f"{where} has the tensors of {len(letters)} kinds of layer ({letters}): {sorted(names)[:6]}")
    return letters[0]


def from_args(args: dict[str, Any], known: dict[str, Known]) -> dict[str, Known]:
    """What the training arguments say, in the configuration's fields; None means that they are silent."""
    has_experts = "E" in known["hybrid_override_pattern"].value + known["mtp_hybrid_override_pattern"].value
    found: dict[str, Known] = {}
    by_layer = _by_layer(args, known)
    for argument, field in FIELDS.items():
        value = args.get(argument)
        if value is None or (field in MOE_ONLY and not has_experts) or field in by_layer:
            continue
        _check_number(argument, field, value)
        _merge(found, {field: Known(value, f"the argument {argument}")})
    if has_experts and "moe_intermediate_size" not in {**found, **by_layer} and args.get("ffn_hidden_size") is not None:
        found["moe_intermediate_size"] = Known(args["ffn_hidden_size"], "the argument ffn_hidden_size")
    if args.get("num_query_groups") is not None and args.get("group_query_attention") is False:
        # Megatron ignores the number of groups then
        found["num_key_value_heads"] = Known(args["num_attention_heads"], "the argument group_query_attention=False")
    if isinstance(args.get("untie_embeddings_and_output_weights"), bool):
        tied = not args["untie_embeddings_and_output_weights"]
        found["tie_word_embeddings"] = Known(tied, "the argument untie_embeddings_and_output_weights")
    if isinstance(args.get("num_layers"), int) and args["num_layers"] != len(known["hybrid_override_pattern"].value):
        raise ValueError(f"num_layers is {args['num_layers']} by the arguments, but the tensors have "
                         f"{len(known['hybrid_override_pattern'].value)} layers")  # fmt: skip
    return found | _patterns(args) | by_layer


# keys of `per_layer_config_overrides`, as Megatron-Bridge writes them for the Puzzle model -> field
OVERRIDES = {"moe_ffn_hidden_size": "moe_intermediate_size", "moe_router_topk": "num_experts_per_tok"}


def _by_layer(args: dict[str, Any], known: dict[str, Known]) -> dict[str, Known]:
    """What differs by layer: an entry for each, None or the arguments that it has for itself."""
    names = ("per_layer_config_overrides", "mtp_per_layer_config_overrides")
    if not any(args.get(name) for name in names):
        return {}
    patterns = [known[field].value for field in ("hybrid_override_pattern", "mtp_hybrid_override_pattern")]
    found: dict[str, list[int]] = {argument: [] for argument in OVERRIDES}
    for name, pattern in zip(names, patterns):
        entries = args.get(name) or [None] * len(pattern)
        if not isinstance(entries, (list, tuple)) or len(entries) != len(pattern):
            raise ValueError(
                f"the argument {name} is {entries!r}: allowed is an entry for each of the {len(pattern)} layers"
            )
        for layer, (letter, entry) in enumerate(zip(pattern, entries)):
            more = set(entry or ()) - set(OVERRIDES)
            if more or (entry and letter != "E"):
                raise ValueError(
                    f"the argument {name}[{layer}] is {entry!r}, of a layer {letter}: allowed are None, and in layers E "
                    f"{' and '.join(OVERRIDES)}"
                )
            for argument, field in OVERRIDES.items() if letter == "E" else ():
                value = (entry or {}).get(argument, args.get(argument))
                _check_number(f"{name}[{layer}].{argument}", field, value)
                found[argument].append(value)
    return {
        OVERRIDES[name]: Known(_one_or_all(sizes), f"the argument {names[0]}") for name, sizes in found.items() if sizes
    }


def _check_number(argument: str, field: str, value: Any) -> None:
    """Refuse what is no size, or no positive number where the field is not a count."""
    kinds = (int, float) if field in FRACTIONS else (int,)
    if type(value) not in kinds or value < 0 or (value == 0 and field not in MOE_ONLY):
        allowed = "a positive number" if field in FRACTIONS else "a positive integer"
        raise ValueError(f"the argument {argument} is {value!r}: allowed is {allowed}")


def _patterns(args: dict[str, Any]) -> dict[str, Known]:
    """The layer pattern: `|` are pipeline cuts, `/` starts the pattern of each depth of multi-token prediction."""
    found = {}
    for argument in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        text = args.get(argument)
        if not isinstance(text, str) or not text:
            continue
        main, *mtp = text.replace("|", "").split("/")
        found["hybrid_override_pattern"] = Known(main, f"the argument {argument}")
        if mtp:
            found["mtp_hybrid_override_pattern"] = Known(mtp[0], f"the argument {argument}")
        break
    if isinstance(args.get("mtp_hybrid_override_pattern"), str):
        pattern = args["mtp_hybrid_override_pattern"]
        found["mtp_hybrid_override_pattern"] = Known(pattern, "the argument mtp_hybrid_override_pattern")
    return found


def _refuse_other_architectures(args: dict[str, Any], pattern: str) -> None:
    rules = dict(REQUIRED)
    rules |= REQUIRED_WITH_EXPERTS if "E" in pattern else {}
    rules |= REQUIRED_WITH_MLP if "-" in pattern or "E" in pattern else {}
    for argument, allowed in rules.items():
        value = args.get(argument)
        if value is not None and value not in allowed:
            raise ValueError(f"the argument {argument}={value!r}: Nemotron-H has {' or '.join(map(repr, allowed))}")


def read_extra(extra: str | Path | dict[str, Any]) -> dict[str, Any]:
    """Fields of a preset or of a config.json, in the configuration's own spelling."""
    given = extra if isinstance(extra, dict) else _read_file(Path(extra))
    if given is not None:
        given = unpack_blocks(given, NemotronHConfig.PER_LAYER_FIELDS)
        config = NemotronHConfig(**given)
    else:
        config = NemotronHConfig.from_preset(str(extra))
    fields = config.plain_dict()
    for name in ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "num_hidden_layers"):
        fields.pop(name, None)
    if given is not None:  # what the file does not say is not a statement
        named = {SYNONYMS.get(name, name) for name in given}
        named |= {"hybrid_override_pattern"} if named & {"layers_block_type", "layer_types"} else set()
        named |= {"mtp_hybrid_override_pattern"} if named & {"mtp_layers_block_type", "mtp_layer_types"} else set()
        fields = {name: value for name, value in fields.items() if name in named}
    return fields


def _read_file(path: Path) -> dict[str, Any] | None:
    path = path / "config.json" if path.is_dir() else path
    return read_json(path) if path.is_file() else None


def _complete_attention(fields: dict[str, Any], known: dict[str, Known]) -> None:
    """head_dim, heads and groups from any one of them, by the widths of linear_proj and linear_qkv."""
    query, rows = fields.pop("query_width", None), fields.pop("qkv_rows", None)
    if query is None or rows is None:
        return
    key_value = (rows - query) // 2
    for count, width in (("num_attention_heads", query), ("num_key_value_heads", key_value)):
        if "head_dim" not in fields and count in fields:
            fields["head_dim"] = width // fields[count]
    for count, width in (("num_attention_heads", query), ("num_key_value_heads", key_value)):
        if "head_dim" in fields:
            fields.setdefault(count, width // fields["head_dim"])
            if fields[count] * fields["head_dim"] != width:
                who = known[count].source if count in known else "the shapes"
                raise ValueError(
                    f"{count}={fields[count]} ({who}) times head_dim={fields['head_dim']} is not {width}, which "
                    f"{known['query_width'].source} and {known['qkv_rows'].source} give"
                )


def _complete_vocabulary(fields: dict[str, Any], checkpoint: SourceCheckpoint) -> list[str]:
    rows = fields.pop("padded_rows", None)
    if rows is None:
        raise ValueError(f"{checkpoint.path} has no embedding.word_embeddings.weight")
    if "vocab_size" not in fields:
        fields["vocab_size"] = rows
        return [f"the true size of the vocabulary is not known, all {rows} rows are kept; give vocab_size by --config"]
    if fields["vocab_size"] > rows:
        raise ValueError(f"vocab_size is {fields['vocab_size']} by the arguments or --config, but the shape of "
                         f"embedding.word_embeddings.weight has {rows} rows")  # fmt: skip
    return []


def _check_product(config: NemotronHConfig, known: dict[str, Known]) -> None:
    if "gs" in known and config.n_groups * config.ssm_state_size != known["gs"].value:
        raise ValueError(
            f"n_groups={config.n_groups} times ssm_state_size={config.ssm_state_size} is not {known['gs'].value}, "
            f"which {known['gs'].source} gives"
        )


def other_groups(config: NemotronHConfig) -> str | None:
    """What to say where the two sides would choose other experts: Hugging Face ranks a group by its best two experts,
    Megatron by as many as each chosen group has of the token's experts."""
    if not config.has_experts or config.topk_group == config.n_group:
        return None
    counts = {config.size("num_experts_per_tok", layer) for layer in config.layers_with("moe")}
    ranked = next((count // config.topk_group for count in sorted(counts) if count // config.topk_group != 2), None)
    if ranked is None:
        return None
    return (
        f"num_experts_per_tok={config.num_experts_per_tok} with topk_group={config.topk_group} of "
        f"{config.n_group} groups: Megatron ranks a group of experts by its best {ranked}, Hugging Face by its best 2"
    )


def to_args(config: NemotronHConfig, padded_rows: int, sizes: dict[str, int], core: str, cuts: str) -> dict[str, Any]:
    """Training arguments for a checkpoint that is written: what Megatron compares on loading, and what `derive` reads.

    `sizes` are the parallel sizes by argument name; `core` "0.19" has the pattern with `|` at the pipeline's cuts
    (given in `cuts`) and the patterns of multi-token prediction after `/`.
    """
    fields = {argument: field for argument, field in FIELDS.items() if config.has_experts or field not in MOE_ONLY}
    args = {argument: getattr(config, field) for argument, field in fields.items() if argument not in OTHER_SPELLINGS}
    if not config.has_experts:
        args |= {"num_experts": None, "moe_ffn_hidden_size": None, "moe_shared_expert_intermediate_size": None}
    else:
        args |= {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
        args |= {"moe_router_enable_expert_bias": True, "moe_router_dtype": "fp32"}
        args |= _overrides(config)
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    mtp = f"/{config.mtp_hybrid_override_pattern}" * config.num_nextn_predict_layers
    newer = core == "0.19"
    return {
        **args,
        **sizes,
        "num_layers": config.num_hidden_layers,
        "encoder_num_layers": config.num_hidden_layers,
        "padded_vocab_size": padded_rows,
        "group_query_attention": True,
        "add_bias_linear": config.mlp_bias or config.attention_bias,
        "add_position_embedding": True,
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "squared_relu": True,
        "swiglu": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "is_hybrid_model": True,
        "hybrid_attention_ratio": 0.0,
        "hybrid_mlp_ratio": 0.0,
        "hybrid_override_pattern": None if newer else config.hybrid_override_pattern,
        "hybrid_layer_pattern": cuts + mtp if newer else None,
        "mtp_num_layers": config.num_nextn_predict_layers or None,
        "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
        "seq_length": config.max_position_embeddings,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "tokenizer_type": None,
        "vocab_file": None,
        "data_parallel_random_init": False,
        "ckpt_format": "torch_dist",
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "iteration": 0,
    }


def _overrides(config: NemotronHConfig) -> dict[str, Any]:
    """Megatron-Bridge's arguments for experts that differ by layer; the largest is what the whole model is said to have."""
    if not any(isinstance(getattr(config, field), list) for field in OVERRIDES.values()):
        return {}
    kinds = [*config.layers_block_type, *(config.mtp_layers_block_type or ())]
    count = config.num_hidden_layers

    def own(layer: int) -> dict[str, int] | None:
        return {name: config.size(field, layer) for name, field in OVERRIDES.items()} if kinds[layer] == "moe" else None

    entries = [own(layer) for layer in range(len(kinds))]
    args = {name: max(entry[name] for entry in entries if entry) for name in OVERRIDES}
    mtp = {"mtp_per_layer_config_overrides": entries[count:], "mtp_pattern_length": len(kinds) - count}
    args |= {"per_layer_config_overrides": entries[:count], "heterogeneous_block_specs": True}
    return args | (mtp if len(kinds) > count else {})
