"""The configuration of every `model_type: nemotron_h` model: reads all spellings in the wild, writes one that all readers take.

A layer is one mixer: Mamba-2 (M), attention (*), MLP (-) or mixture of experts (E). The order is a pattern string such as
`M-M*-`. What this class guarantees after construction:

    layers_block_type   list of "linear_attention" | "full_attention" | "mlp" | "moe", one per layer (transformers' names)
    mlp_widths          one width per MLP layer, in order
    size(field, layer)  a size of one layer: each of PER_LAYER_FIELDS may be one int, or a list with one for each layer of
                        its kind, the layers of multi-token prediction last
    time_step_limit     (low, high) of the Mamba step size; absent or null means (0, inf), never (time_step_min, inf)

Widths are never derived from `expand` or `hidden_size`: the Mamba width is heads * head_dim (`mamba_intermediate_size`).

What an ordinary file cannot say (experts that differ by layer, sliding windows) makes it a NemotronHPuzzleConfig, whose files
are laid out as the released Puzzle model's (block_configs.py).
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from .block_configs import LAYOUT_FIELDS, LEGACY_TYPES, REQUIRED, pack_blocks, plain_kind, unpack_blocks
from .configuration_checks import LARGEST, check_dtype, check_fields, check_token_ids
from .presets import PATTERN_8B, PRESETS

LETTER_TO_TYPE = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
TYPE_TO_LETTER = {name: letter for letter, name in LETTER_TO_TYPE.items()}

# Other spellings of a field -> the field. A value in another spelling is used only where the field itself is not given.
SYNONYMS = {
    "attention_head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "norm_eps": "layer_norm_epsilon",
    "mamba_proj_bias": "use_bias",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_d_state": "ssm_state_size",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}

# Spellings of which an override replaces all: a new pattern does not go with the old number of layers.
LAYER_SPELLINGS = ("layers_block_type", "layer_types", "hybrid_override_pattern", "num_hidden_layers")
MTP_SPELLINGS = ("mtp_layers_block_type", "mtp_layer_types", "mtp_hybrid_override_pattern")

# Written as well as the field, because readers require them: llama.cpp before September 2026 and TensorRT-LLM; mlx-lm.
WRITTEN_TWICE = ("rms_norm_eps", "mamba_proj_bias")

# Written only when the model has experts: llama.cpp takes a dense model for a mixture of experts if it sees them.
MOE_FIELDS = (
    "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_shared_expert_overlap", "routed_scaling_factor",
    "n_group", "topk_group", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip
MTP_FIELDS = ("num_nextn_predict_layers", "mtp_hybrid_override_pattern")

NO_LIMIT = (0.0, math.inf)  # of the step size; left out of files, since JSON has no infinity

# Of these, lists are told by nobody but the Puzzle layout; where all entries agree they are one value.
PUZZLE_LISTS = (
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size",
)  # fmt: skip


class NemotronHConfig(PreTrainedConfig):
    """Configuration of a Nemotron-H model; the defaults are the 8B of arXiv 2504.03624.

    Layers come from `hybrid_override_pattern` ("M-M*-"), or from a list in `layers_block_type` (or `layer_types`) with
    the names linear_attention/mamba, full_attention/attention, mlp, moe. Sizes are counts of elements.
    Sizes of MLP and Mamba layers, `num_attention_heads`, the sizes and counts of experts and `sliding_window` (tokens, the
    newest included; None sees all) are one for every layer of their kind, or a list with one for each of them. A list may go
    on with those of multi-token prediction, which else have the largest.
    `mamba_implementation` chooses the ops: "auto" (the packages' kernels where they and the tensors allow; on a CPU, for
    single tokens, our own where Numba is installed), "torch", "kernels" (the packages'), "triton" (ours, not timed yet).

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    model_type = "nemotron_h"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"layer_types": "layers_block_type", **SYNONYMS}
    # Fields that may be a list -> the kind of layer that has them: one entry for each layer of that kind, in order.
    PER_LAYER_FIELDS = {
        "intermediate_size": "mlp",
        "mamba_num_heads": "linear_attention",
        "mamba_head_dim": "linear_attention",
        "num_attention_heads": "full_attention",
        "sliding_window": "full_attention",
        **dict.fromkeys(PUZZLE_LISTS, "moe"),
    }
    fields_of_others = ()  # that a package around these files adds; None and {} are not written
    # in_proj packs five blocks of rows (gate, x, B, C, dt), so it is gathered before they are cut apart; conv and scan run
    # on every rank, while the weights, which are nearly all of a Mamba layer, are split.
    base_model_tp_plan = {
        "embeddings": "embedding_rowwise",
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.out_proj": "rowwise_split_input",
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
        "layers.*.mixer.up_proj": "colwise",
        "layers.*.mixer.down_proj": "rowwise",
        "layers.*.mixer.shared_experts.up_proj": "colwise",
        "layers.*.mixer.shared_experts.down_proj": "rowwise",
        "layers.*.mixer.experts.up_proj": "colwise",
        "layers.*.mixer.experts.down_proj": "rowwise",
        "layers.*.mixer.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mixer.experts.up_proj": "grouped_gemm",
        "layers.*.mixer.experts.down_proj": "grouped_gemm",
        "layers.*.mixer.experts": "ep_dispatch_experts",
    }
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm_f": "keep_full_weight",
    }

    vocab_size: int = 131072
    hidden_size: int = 4096
    layers_block_type: list[str] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    num_logits_to_keep: int = 1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    max_position_embeddings: int = 8192
    # attention: grouped queries, no position embedding
    num_attention_heads: int | list[int] = 32
    num_key_value_heads: int | None = 8
    head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | list[int | None] | None = None
    # MLP
    intermediate_size: int | list[int] = 21504
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False
    # Mamba-2
    mamba_num_heads: int | list[int] = 128
    mamba_head_dim: int | list[int] = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    chunk_size: int = 128
    expand: int = 2
    mamba_hidden_act: str = "silu"
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[float] | tuple[float, float] | None = NO_LIMIT
    mamba_ssm_cache_dtype: str = "float32"
    mamba_implementation: str = "auto"
    # mixture of experts
    n_routed_experts: int | list[int] = 8
    num_experts_per_tok: int | list[int] = 2
    n_shared_experts: int = 1
    moe_intermediate_size: int | list[int] = 7688
    moe_shared_expert_intermediate_size: int | list[int] = 7688
    moe_latent_size: int | list[int | None] | None = None
    moe_shared_expert_overlap: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    # multi-token prediction
    num_nextn_predict_layers: int = 0
    mtp_layers_block_type: list[str] | None = None
    # everywhere
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    residual_in_fp32: bool = False
    rescale_prenorm_residual: bool = True
    hidden_dropout: float = 0.0

    def __new__(cls, *args: Any, **given: Any) -> "NemotronHConfig":
        config = super().__new__(NemotronHPuzzleConfig if cls is NemotronHConfig and _needs_blocks(given) else cls)
        if given:  # kept until `__post_init__`: a field that is given wins, even if it is given its default
            config.__dict__["_given"] = {name for name, value in given.items() if value is not None}
        return config

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.__dict__.pop("_given", set())
        if any(name in kwargs for name in LAYOUT_FIELDS):
            told = {name: kwargs[name] if name in kwargs else getattr(self, name) for name in given}
            kwargs = {name: value for name, value in kwargs.items() if name not in LAYOUT_FIELDS}
            for name, value in unpack_blocks(told, self.PER_LAYER_FIELDS).items():
                if name in self.__dataclass_fields__:
                    setattr(self, name, value)
                else:
                    kwargs[name] = value
        self._blockwise = kwargs.pop("blockwise", None)
        kwargs.pop("model_type", None)  # the class has it
        for name in [name for name in kwargs if name in SYNONYMS]:
            value, field = kwargs.pop(name), SYNONYMS[name]
            if field not in given:
                setattr(self, field, value)
        self.layers_block_type = _read_layers(
            kwargs.pop("layer_types", None) or self.layers_block_type,
            kwargs.pop("hybrid_override_pattern", None),
            kwargs.pop("num_hidden_layers", None),
        )
        mtp_pattern = kwargs.pop("mtp_hybrid_override_pattern", None)
        mtp_layers = kwargs.pop("mtp_layer_types", None) or self.mtp_layers_block_type
        if self.num_nextn_predict_layers is None:
            self.num_nextn_predict_layers = 0
        self.mtp_layers_block_type = (
            _read_layers(mtp_layers, mtp_pattern, None, default="*E", field="mtp_layers_block_type")
            if self.num_nextn_predict_layers  # transformers writes a default pattern into models that have none
            else None
        )
        if kwargs.pop("use_mamba_kernels", True) is False and "mamba_implementation" not in given:
            self.mamba_implementation = "torch"
        if self.num_key_value_heads is None:
            self.require_uniform("num_attention_heads")
            self.num_key_value_heads = self.num_attention_heads
        self.time_step_limit = _read_time_step_limit(self.time_step_limit)
        check_dtype(kwargs.get("torch_dtype") or self.dtype)
        check_token_ids(self)
        super().__post_init__(**kwargs)
        self.validate()
        for field in (*PUZZLE_LISTS, "sliding_window"):
            sizes = getattr(self, field)
            if isinstance(sizes, list) and len(set(sizes)) == 1:
                setattr(self, field, sizes[0])

    def validate(self) -> None:
        """Check every field again, and take the class whose files can say them; transformers calls it before saving."""
        check_fields(self)
        told = {field: getattr(self, field) for field in (*PUZZLE_LISTS, "sliding_window")}
        if type(self) is NemotronHConfig and _needs_blocks(told):  # they were set after it was made
            self.__class__ = NemotronHPuzzleConfig

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "NemotronHConfig":
        """As transformers'; a field in `kwargs` wins in whichever spelling, over all spellings of it in `config_dict`.

        Raises:
            ValueError: for the configuration of another kind of model.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type and cls not in _layouts(found):
            raise ValueError(f"model_type={found!r}: allowed is {cls.model_type!r}")
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in _spellings(cls)}
        told, overrides = (unpack_blocks(fields, cls.PER_LAYER_FIELDS) for fields in (config_dict, overrides))
        return super().from_dict({**_without(told, overrides), **overrides}, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """As transformers'. Where the files are of the other layout, `blockwise` says so and not `model_type`, of which
        transformers would warn."""
        fields, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = fields.get("model_type")
        if cls is NemotronHConfig and found == NemotronHPuzzleConfig.model_type:
            fields = unpack_blocks(
                {name: it for name, it in fields.items() if name != "model_type"}, cls.PER_LAYER_FIELDS
            )
            fields.setdefault("blockwise", [])
        return fields, rest

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "NemotronHConfig":
        """The released shape called `name` ("nemotron-h-8b", "nano-9b-v2", "3-super", ...), with fields overridden."""
        short = name.lower()
        for prefix in ("nvidia/", "nvidia-", "nemotron-", "h-"):
            short = short.removeprefix(prefix)
        if short not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown: allowed are {', '.join(preset_names())}")
        return cls(**{**PRESETS[short], **overrides})

    # Derived sizes, each computed in one place.

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers_block_type)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int | None) -> None:
        if value is not None and value != len(self.layers_block_type):
            raise ValueError(
                f"num_hidden_layers={value} does not match the {len(self.layers_block_type)} layers of "
                f"hybrid_override_pattern={self.hybrid_override_pattern!r}; change the pattern instead"
            )

    @property
    def hybrid_override_pattern(self) -> str:
        return "".join(TYPE_TO_LETTER[name] for name in self.layers_block_type)

    @property
    def mtp_hybrid_override_pattern(self) -> str:
        return "".join(TYPE_TO_LETTER[name] for name in self.mtp_layers_block_type or [])

    def size(self, field: str, layer_idx: int) -> int | None:
        """`field`, one of PER_LAYER_FIELDS, of layer `layer_idx`. Layers past the stack are those of multi-token prediction,
        all depths alike; they have the largest size where a list does not name theirs."""
        value, kinds, kind = getattr(self, field), self.layers_block_type, self.PER_LAYER_FIELDS[field]
        if not isinstance(value, list):
            return value
        if layer_idx < len(kinds):
            return value[kinds[:layer_idx].count(kind)]
        mtp = self.mtp_layers_block_type or []
        number = kinds.count(kind) + mtp[: (layer_idx - len(kinds)) % max(1, len(mtp))].count(kind)
        if len(value) > kinds.count(kind):
            return value[number]
        return None if None in value else max(value)

    def layers_with(self, kind: str) -> list[int]:
        """Indices of the layers with that mixer, those of multi-token prediction, which follow the stack, included."""
        every = [*self.layers_block_type, *(self.mtp_layers_block_type or [])]
        return [index for index, found in enumerate(every) if found == kind]

    def drop_mtp(self) -> None:
        """Leave multi-token prediction out, and its entries in lists of sizes."""
        for field, kind in self.PER_LAYER_FIELDS.items():
            if isinstance(sizes := getattr(self, field), list):
                setattr(self, field, sizes[: self.layers_block_type.count(kind)])
        self.num_nextn_predict_layers, self.mtp_layers_block_type = 0, None

    def mamba_width(self, layer_idx: int) -> int:
        """Width of Mamba layer `layer_idx`: heads * head_dim."""
        return self.size("mamba_num_heads", layer_idx) * self.size("mamba_head_dim", layer_idx)

    def conv_width(self, layer_idx: int) -> int:
        """Channels of the causal convolution of Mamba layer `layer_idx`: x, B and C."""
        return self.mamba_width(layer_idx) + 2 * self.n_groups * self.ssm_state_size

    @property
    def mamba_intermediate_size(self) -> int:
        """Width of every Mamba layer: heads * head_dim; `mamba_width(layer)` where they differ."""
        self.require_uniform("mamba_num_heads", "mamba_head_dim")
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of every causal convolution: x, B and C; `conv_width(layer)` where they differ."""
        return self.mamba_intermediate_size + 2 * self.n_groups * self.ssm_state_size

    def require_uniform(self, *fields: str) -> None:
        """Raise a ValueError if a field is a list, for readers that know one size alone."""
        for field in fields:
            if isinstance(value := getattr(self, field), list):
                raise ValueError(f"{field}={value!r}: allowed is one size for every layer here")

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """Width of each MLP layer of the main stack, in order."""
        layers = [index for index, kind in enumerate(self.layers_block_type) if kind == "mlp"]
        return tuple(self.size("intermediate_size", index) for index in layers)

    @property
    def has_experts(self) -> bool:
        return "moe" in self.layers_block_type or "moe" in (self.mtp_layers_block_type or [])

    # Writing.

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`, in the one layout that old and new readers accept."""
        output = self.plain_dict()
        if self.sliding_window is None:
            del output["sliding_window"]
        return output

    def plain_dict(self) -> dict[str, Any]:
        """The fields as `from_dict` takes them, with a pattern and lists of sizes, whichever layout the files have."""
        output = with_plain_limit(super().to_dict())
        for name in ("layers_block_type", "mtp_layers_block_type", "_blockwise"):
            output.pop(name, None)
        output["hybrid_override_pattern"] = self.hybrid_override_pattern
        output["num_hidden_layers"] = self.num_hidden_layers
        output |= {name: getattr(self, name) for name in WRITTEN_TWICE}
        if self.mtp_layers_block_type:
            output["mtp_hybrid_override_pattern"] = self.mtp_hybrid_override_pattern
        output.pop("mamba_implementation", None)  # a choice for this machine, not a property of the model
        dropped = () if self.has_experts else MOE_FIELDS
        dropped += tuple(name for name in self.fields_of_others if not getattr(self, name))
        dropped += () if self.num_nextn_predict_layers else MTP_FIELDS
        return {key: value for key, value in output.items() if key not in dropped}


class NemotronHPuzzleConfig(NemotronHConfig):
    """A configuration whose files have `block_configs`, as the released Puzzle model's; all else is NemotronHConfig's."""

    model_type = "nemotron_h_puzzle"

    def to_dict(self) -> dict[str, Any]:
        """As NemotronHConfig's, with blocks in place of the pattern; fields are said by block if they were read so, or differ."""
        output = self.plain_dict()
        kinds = {*self.layers_block_type, *(self.mtp_layers_block_type or [])}
        blockwise = self._blockwise
        if blockwise is None:
            blockwise = [field for kind, fields in REQUIRED.items() if kind in kinds for field in fields]
            blockwise += [] if self.moe_latent_size is None else ["moe_latent_size"]
        lists = [field for field in self.PER_LAYER_FIELDS if isinstance(getattr(self, field), list)]
        dropped = {"hybrid_override_pattern", "mtp_hybrid_override_pattern", *blockwise, *lists}
        output = {key: value for key, value in output.items() if key not in dropped}
        if isinstance(self.architectures, list):
            own = [re.sub(r"^NemotronH(?=For|Model)", "NemotronHPuzzle", str(it)) for it in self.architectures]
            output["architectures"] = own
        return output | pack_blocks(self, blockwise)


def _needs_blocks(fields: Mapping[str, Any]) -> bool:
    """Whether these fields are of a Puzzle file, or an ordinary file cannot say them."""
    told = [fields.get(name) is not None for name in ("block_configs", "blockwise")]
    if fields.get("model_type") == NemotronHPuzzleConfig.model_type or any(told):
        return True
    lists = [fields.get(field) for field in PUZZLE_LISTS]
    differ = any(isinstance(sizes, (list, tuple)) and any(size != sizes[0] for size in sizes) for sizes in lists)
    window = fields.get("sliding_window")
    return differ or (any(window) if isinstance(window, (list, tuple)) else window is not None)


def _layouts(model_type: str) -> tuple[type[NemotronHConfig], ...]:
    """The classes that read files of a kind: either reads both."""
    both = (NemotronHConfig, NemotronHPuzzleConfig)
    return both if model_type in [each.model_type for each in both] else ()


def with_plain_limit(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json with a `time_step_limit` that is JSON and that every reader takes: no limit is left out,
    and where only the upper one is infinite it is the largest fp32 number, which changes nothing."""
    low, high = _read_time_step_limit(fields.get("time_step_limit"))
    fields = {name: value for name, value in fields.items() if name != "time_step_limit"}
    return fields if (low, high) == NO_LIMIT else {**fields, "time_step_limit": [low, min(high, LARGEST)]}


def preset_names() -> list[str]:
    """Names that `NemotronHConfig.from_preset` takes, in order of release."""
    return [f"nemotron-h-{name}" if name[0].isdigit() and name.endswith("b") and "-" not in name else f"nemotron-{name}"
            for name in PRESETS]  # fmt: skip


def _spellings(config_class: type[NemotronHConfig]) -> set[str]:
    """Every name under which a field of ours can be given."""
    fields = set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    others = (*SYNONYMS, *LAYER_SPELLINGS, *MTP_SPELLINGS, *LAYOUT_FIELDS, "use_mamba_kernels")
    return {*fields, *config_class.fields_of_others, *others}


def _without(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`fields` without anything that is a spelling of one of `overrides`."""
    replaced = {SYNONYMS.get(name, name) for name in overrides}
    for spellings in (LAYER_SPELLINGS, MTP_SPELLINGS):
        if any(name in overrides for name in spellings if name != "num_hidden_layers"):
            replaced.update(spellings)
    if "use_mamba_kernels" in overrides:
        replaced.add("mamba_implementation")
    return {name: value for name, value in fields.items() if SYNONYMS.get(name, name) not in replaced}


def _read_layers(
    layers: list[str] | None,
    pattern: str | None,
    count: int | None,
    default: str = PATTERN_8B,
    field: str = "layers_block_type",
) -> list[str]:
    pattern_field = "hybrid_override_pattern" if field == "layers_block_type" else "mtp_hybrid_override_pattern"
    if pattern is not None:
        if not isinstance(pattern, str) or not pattern or set(pattern) - set(LETTER_TO_TYPE):
            raise ValueError(f"{pattern_field}={pattern!r}: allowed are strings of {', '.join(LETTER_TO_TYPE)}")
        from_pattern = [LETTER_TO_TYPE[letter] for letter in pattern]
    if layers is not None:
        if not isinstance(layers, (list, tuple)) or not layers:
            raise ValueError(f"{field}={layers!r}: allowed is a non-empty list of {', '.join(TYPE_TO_LETTER)}")
        layers = list(map(plain_kind, layers))
        for index, name in enumerate(layers):
            if not isinstance(name, str) or name not in TYPE_TO_LETTER:
                allowed = ", ".join([*TYPE_TO_LETTER, *LEGACY_TYPES])
                raise ValueError(f"{field}[{index}]={name!r}: allowed are {allowed}")
        if pattern is not None and layers != from_pattern:
            raise ValueError(
                f"{pattern_field}={pattern!r} and {field}={layers} describe different layers; give one of them"
            )
    else:
        layers = from_pattern if pattern is not None else [LETTER_TO_TYPE[letter] for letter in default]
    if count is not None and count != len(layers):
        given = f"{pattern_field}={pattern!r}" if pattern is not None else field
        raise ValueError(f"num_hidden_layers={count} does not match {given}, which has {len(layers)} layers")
    return layers


def _read_time_step_limit(value: Any) -> tuple[float, float]:
    """(low, high); null, absent, `Infinity`, "inf", {"__float__": "Infinity"} and LARGEST are all spellings found in files."""
    if value is None:
        return NO_LIMIT
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"time_step_limit={value!r}: allowed is null or a pair [low, high]")
    low, high = (item.get("__float__") if isinstance(item, dict) else item for item in value)
    try:
        low, high = float(0.0 if low is None else low), float("inf" if high is None else high)
    except (TypeError, ValueError):
        raise ValueError(f"time_step_limit={value!r}: allowed is null or a pair of numbers [low, high]") from None
    high = math.inf if high >= LARGEST else high
    if not 0.0 <= low < high:
        raise ValueError(f"time_step_limit={value!r}: allowed is 0 <= low < high")
    return (low, high)
