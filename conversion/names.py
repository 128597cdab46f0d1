"""The one table of tensors: Megatron's name, the Hugging Face names, shape, and how tensor parallelism cuts it.

Both directions, all checks and the dry run come from `links`, which walks the table for a configuration. A new tensor
is a new row; a new spelling of an old one goes into its row's `others`.

    Megatron  decoder.layers.N.‹row›   mtp.layers.D.mtp_model_layer.layers.I.‹row›
    HF        backbone.layers.N.‹row›  mtp.layers.(D * depth + I).‹row›

Shapes are written in the sizes of `sizes_of`; `a+b` on the first axis are parts, one after another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig

ROWS, COLUMNS, COPY = "rows", "columns", "copy"  # what a tensor-parallel rank holds: a range of axis 0, of axis 1, all
PLAIN, PARTS, QKV, VOCAB = "plain", "parts", "qkv", "vocab"


class Row(NamedTuple):
    """One line of the table; `{e}` stands for the expert, `when` names the configuration field that it needs."""

    megatron: str
    hf: str  # several names, separated by spaces, for QKV
    shape: str
    split: str
    layout: str = PLAIN
    others: tuple[str, ...] = ()
    when: str = ""


TOP = (
    Row("embedding.word_embeddings.weight", "backbone.embeddings.weight", "V h", ROWS, VOCAB),
    Row("decoder.final_norm.weight", "backbone.norm_f.weight", "h", COPY, others=("decoder.final_layernorm.weight",)),
    Row("output_layer.weight", "lm_head.weight", "V h", ROWS, VOCAB),
)
BLOCKS = {
    "M": (
        Row("mixer.in_proj.layer_norm_weight", "norm.weight", "h", COPY, others=("norm.weight",)),
        Row("mixer.in_proj.weight", "mixer.in_proj.weight", "z+x+B+C+dt h", ROWS, PARTS),
        Row("mixer.in_proj.bias", "mixer.in_proj.bias", "z+x+B+C+dt", ROWS, PARTS, when="use_bias"),
        Row("mixer.conv1d.weight", "mixer.conv1d.weight", "x+B+C 1 kernel", ROWS, PARTS, ("mixer.conv1d_weight",)),
        Row("mixer.conv1d.bias", "mixer.conv1d.bias", "x+B+C", ROWS, PARTS, ("mixer.conv1d_bias",), "use_conv_bias"),
        Row("mixer.A_log", "mixer.A_log", "dt", ROWS),
        Row("mixer.D", "mixer.D", "dt", ROWS),
        Row("mixer.dt_bias", "mixer.dt_bias", "dt", ROWS),
        Row("mixer.norm.weight", "mixer.norm.weight", "x", ROWS),
        Row("mixer.out_proj.weight", "mixer.out_proj.weight", "h x", COLUMNS),
        Row("mixer.out_proj.bias", "mixer.out_proj.bias", "h", COPY, when="use_bias"),
    ),
    "*": (
        Row("self_attention.linear_qkv.layer_norm_weight", "norm.weight", "h", COPY,
            others=("input_layernorm.weight",)),
        Row("self_attention.linear_qkv.weight", "mixer.q_proj.weight mixer.k_proj.weight mixer.v_proj.weight",
            "q+k+v h", ROWS, QKV),
        Row("self_attention.linear_qkv.bias", "mixer.q_proj.bias mixer.k_proj.bias mixer.v_proj.bias",
            "q+k+v", ROWS, QKV, when="attention_bias"),
        Row("self_attention.linear_proj.weight", "mixer.o_proj.weight", "h q", COLUMNS),
        Row("self_attention.linear_proj.bias", "mixer.o_proj.bias", "h", COPY, when="attention_bias"),
    ),
    "-": (
        Row("mlp.linear_fc1.layer_norm_weight", "norm.weight", "h", COPY, others=("pre_mlp_layernorm.weight",)),
        Row("mlp.linear_fc1.weight", "mixer.up_proj.weight", "f h", ROWS),
        Row("mlp.linear_fc1.bias", "mixer.up_proj.bias", "f", ROWS, when="mlp_bias"),
        Row("mlp.linear_fc2.weight", "mixer.down_proj.weight", "h f", COLUMNS),
        Row("mlp.linear_fc2.bias", "mixer.down_proj.bias", "h", COPY, when="mlp_bias"),
    ),
    "E": (
        Row("pre_mlp_layernorm.weight", "norm.weight", "h", COPY),
        Row("mlp.router.weight", "mixer.gate.weight", "E h", COPY),
        Row("mlp.router.expert_bias", "mixer.gate.e_score_correction_bias", "E", COPY),
        Row("mlp.fc1_latent_proj.weight", "mixer.fc1_latent_proj.weight", "l h", COPY, when="moe_latent_size"),
        Row("mlp.fc2_latent_proj.weight", "mixer.fc2_latent_proj.weight", "h l", COPY, when="moe_latent_size"),
        Row("mlp.experts.linear_fc1.weight{e}", "mixer.experts.{e}.up_proj.weight", "m l", ROWS,
            others=("mlp.experts.local_experts.{e}.linear_fc1.weight", "mlp.experts.{e}.linear_fc1.weight",
                    "mlp.experts.experts.{e}.linear_fc1.weight")),
        Row("mlp.experts.linear_fc2.weight{e}", "mixer.experts.{e}.down_proj.weight", "l m", COLUMNS,
            others=("mlp.experts.local_experts.{e}.linear_fc2.weight", "mlp.experts.{e}.linear_fc2.weight",
                    "mlp.experts.experts.{e}.linear_fc2.weight")),
        Row("mlp.shared_experts.linear_fc1.weight", "mixer.shared_experts.up_proj.weight", "s h", ROWS),
        Row("mlp.shared_experts.linear_fc2.weight", "mixer.shared_experts.down_proj.weight", "h s", COLUMNS),
    ),
}  # fmt: skip
MTP_FIRST = (
    Row("enorm.weight", "enorm.weight", "h", COPY),
    Row("hnorm.weight", "hnorm.weight", "h", COPY),
    Row("eh_proj.weight", "eh_proj.weight", "h h+h", ROWS),
)
MTP_LAST = (Row("final_layernorm.weight", "final_layernorm.weight", "h", COPY),)

# Modules that Transformer Engine gives an `_extra_state`; Megatron insists on one entry each (empty ones will do).
EXTRA_STATE_TOP = ("decoder.final_norm", "output_layer")
EXTRA_STATE_MTP = ("enorm", "hnorm", "eh_proj", "final_layernorm")
EXTRA_STATE = {
    "M": ("mixer.in_proj", "mixer.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "E": ("pre_mlp_layernorm", "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"),
}
EXTRA_STATE_LATENT = ("mlp.fc1_latent_proj", "mlp.fc2_latent_proj")
EXTRA_STATE_EXPERTS = ("linear_fc1", "linear_fc2")


class Link(NamedTuple):
    """One Megatron tensor, the HF tensors that hold the same numbers, and where the model has it."""

    megatron: tuple[str, ...]  # the first is the usual spelling
    hf: tuple[str, ...]
    shape: tuple[int, ...]  # of the Megatron tensor, with the vocabulary not padded
    parts: tuple[tuple[str, int], ...]  # (name, size) along the first axis
    split: str
    layout: str
    expert: int | None = None
    layer: int | None = None  # of the main stack; None at both ends and in multi-token prediction

    @property
    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the HF tensors."""
        if self.layout == QKV:
            return tuple((size, *self.shape[1:]) for _, size in self.parts)
        return (self.shape,)


def links(config: NemotronHConfig) -> Iterator[Link]:
    """Every tensor of a model of this configuration, in order of depth."""
    embeddings, final_norm, output_layer = TOP
    sizes = sizes_of(config)
    yield _link(embeddings, "", "", sizes)
    widths = iter(config.mlp_widths)
    for layer, letter in enumerate(config.hybrid_override_pattern):
        if letter == "-":
            sizes["f"] = next(widths)
        prefixes = (f"decoder.layers.{layer}.", f"backbone.layers.{layer}.")
        for link in _block(config, letter, *prefixes, sizes):
            yield link._replace(layer=layer)
    yield _link(final_norm, "", "", sizes)
    if not config.tie_word_embeddings:
        yield _link(output_layer, "", "", sizes)
    yield from _mtp(config, sizes)


def sizes_of(config: NemotronHConfig) -> dict[str, int]:
    """The sizes that the table's shapes are written in."""
    bc = config.n_groups * config.ssm_state_size
    return {
        "1": 1,
        "V": config.vocab_size,
        "h": config.hidden_size,
        "z": config.mamba_intermediate_size,
        "x": config.mamba_intermediate_size,
        "B": bc,
        "C": bc,
        "dt": config.mamba_num_heads,
        "kernel": config.conv_kernel,
        "q": config.num_attention_heads * config.head_dim,
        "k": config.num_key_value_heads * config.head_dim,
        "v": config.num_key_value_heads * config.head_dim,
        "f": max(config.mlp_widths, default=0) or _first(config.intermediate_size),
        "E": config.n_routed_experts,
        "m": config.moe_intermediate_size,
        "l": config.moe_latent_size or config.hidden_size,
        "s": config.moe_shared_expert_intermediate_size,
    }


def _first(value: int | list[int]) -> int:
    return value if isinstance(value, int) else max(value, default=0)


def _block(config: NemotronHConfig, letter: str, megatron: str, hf: str, sizes: dict[str, int]) -> Iterator[Link]:
    for row in BLOCKS[letter]:
        if row.when and not getattr(config, row.when):
            continue
        for expert in range(config.n_routed_experts) if "{e}" in row.megatron else (None,):
            yield _link(row, megatron, hf, sizes, expert)


def _mtp(config: NemotronHConfig, sizes: dict[str, int]) -> Iterator[Link]:
    pattern = config.mtp_hybrid_override_pattern
    for depth in range(config.num_nextn_predict_layers):
        for inner, letter in enumerate(pattern):
            hf, megatron = f"mtp.layers.{depth * len(pattern) + inner}.", f"mtp.layers.{depth}."
            for row in MTP_FIRST if inner == 0 else ():
                yield _link(row, megatron, hf, sizes)
            yield from _block(config, letter, f"{megatron}mtp_model_layer.layers.{inner}.", hf, sizes)
            for row in MTP_LAST if inner == len(pattern) - 1 else ():
                yield _link(row, megatron, hf, sizes)


def _link(row: Row, megatron: str, hf: str, sizes: dict[str, int], expert: int | None = None) -> Link:
    axes = [[(name, sizes[name]) for name in axis.split("+")] for axis in row.shape.split()]
    return Link(
        megatron=tuple(megatron + name.replace("{e}", str(expert)) for name in (row.megatron, *row.others)),
        hf=tuple(hf + name.replace("{e}", str(expert)) for name in row.hf.split()),
        shape=tuple(sum(size for _, size in axis) for axis in axes),
        parts=tuple(axes[0]),
        split=row.split,
        layout=row.layout,
        expert=expert,
    )


class Place(NamedTuple):
    """What a Megatron name says: its row, the text before the row's part of it, and the expert."""

    row: Row
    prefix: str
    expert: int | None

    def name(self, expert: int | None = None) -> str:
        """The usual spelling of the name, with another expert if asked."""
        return self.prefix + self.row.megatron.replace("{e}", str(self.expert if expert is None else expert))


_BLOCK_PREFIX = re.compile(r"(?:decoder\.layers\.\d+\.|mtp\.layers\.\d+\.mtp_model_layer\.layers\.\d+\.)")
_MTP_PREFIX = re.compile(r"mtp\.layers\.\d+\.(?!mtp_model_layer\.)")


def _spellings(rows: tuple[Row, ...]) -> list[tuple[re.Pattern, Row]]:
    names = [(name, row) for row in rows for name in (row.megatron, *row.others)]
    return [(re.compile(re.escape(name).replace(r"\{e\}", r"(\d+)")), row) for name, row in names]


# E before "-": `pre_mlp_layernorm.weight` is the usual name in the one and another spelling in the other
_IN_BLOCK = [pair for letter in "M*E-" for pair in _spellings(BLOCKS[letter])]
_IN_MTP = _spellings((*MTP_FIRST, *MTP_LAST))
_AT_TOP = _spellings(TOP)


def place(name: str) -> Place | None:
    """Find a Megatron tensor's name (without a `model.` or `module.` prefix) in the table; None if it is not there."""
    for prefix, rows in ((_BLOCK_PREFIX, _IN_BLOCK), (_MTP_PREFIX, _IN_MTP), (None, _AT_TOP)):
        found = prefix.match(name) if prefix else None
        if prefix and not found:
            continue
        start = found.end() if found else 0
        for pattern, row in rows:
            match = pattern.fullmatch(name, start)
            if match:
                return Place(row, name[:start], int(match[1]) if match.groups() else None)
        return None
    return None
