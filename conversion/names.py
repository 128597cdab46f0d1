"""The one table of tensors: Megatron's name, the Hugging Face names, shape, and how tensor parallelism cuts it.

Both directions, all checks and the dry run come from `links`, which walks the table for a configuration. A new tensor
is a new row; a new spelling of an old one goes into its row's `others`.

    Megatron  decoder.layers.N.‹row›   mtp.layers.D.mtp_model_layer.layers.I.‹row›
    HF        backbone.layers.N.‹row›  mtp.layers.(D * depth + I).‹row›

Shapes, and whether a model has a tensor at all, are in the table of HF tensors (tensors.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from nemotron_h_hf import tensors
from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.weights import name_in_file
from nemotron_h_hf.tensors import is_there, sizes

ROWS, COLUMNS, COPY = "rows", "columns", "copy"  # what a tensor-parallel rank holds: a range of axis 0, of axis 1, all
PLAIN, PARTS, QKV, VOCAB = "plain", "parts", "qkv", "vocab"
HEADS, FLAT = "heads", "flat"  # of towers: q, k and v of each head; the HF tensor has an axis of 1 before


class Row(NamedTuple):
    """One line of the table; `{e}` stands for the expert."""

    megatron: str
    hf: str  # several names, separated by spaces, for QKV
    split: str
    layout: str = PLAIN
    others: tuple[str, ...] = ()

    @property
    def hf_rows(self) -> list[tensors.Row]:
        """Its rows in the table of HF tensors."""
        return [tensors.ROWS[name] for name in self.hf.split()]

    @property
    def shape(self) -> list[list[str]]:
        """The letters on each axis; those of Q, K and V one after another on the first."""
        first, *rest = zip(*(row.shape.split() for row in self.hf_rows))
        return [[letter for word in first for letter in word.split("+")], *(words[0].split("+") for words in rest)]


TOP = (
    Row("embedding.word_embeddings.weight", "backbone.embeddings.weight", ROWS, VOCAB),
    Row("decoder.final_norm.weight", "backbone.norm_f.weight", COPY, others=("decoder.final_layernorm.weight",)),
    Row("output_layer.weight", "lm_head.weight", ROWS, VOCAB),
)
BLOCKS = {
    "M": (
        Row("mixer.in_proj.layer_norm_weight", "norm.weight", COPY, others=("norm.weight",)),
        Row("mixer.in_proj.weight", "mixer.in_proj.weight", ROWS, PARTS),
        Row("mixer.in_proj.bias", "mixer.in_proj.bias", ROWS, PARTS),
        Row("mixer.conv1d.weight", "mixer.conv1d.weight", ROWS, PARTS, ("mixer.conv1d_weight",)),
        Row("mixer.conv1d.bias", "mixer.conv1d.bias", ROWS, PARTS, ("mixer.conv1d_bias",)),
        Row("mixer.A_log", "mixer.A_log", ROWS),
        Row("mixer.D", "mixer.D", ROWS),
        Row("mixer.dt_bias", "mixer.dt_bias", ROWS),
        Row("mixer.norm.weight", "mixer.norm.weight", ROWS),
        Row("mixer.out_proj.weight", "mixer.out_proj.weight", COLUMNS),
        Row("mixer.out_proj.bias", "mixer.out_proj.bias", COPY),
    ),
    "*": (
        Row("self_attention.linear_qkv.layer_norm_weight", "norm.weight", COPY, others=("input_layernorm.weight",)),
        Row("self_attention.linear_qkv.weight", "mixer.q_proj.weight mixer.k_proj.weight mixer.v_proj.weight", ROWS,
            QKV),
        Row("self_attention.linear_qkv.bias", "mixer.q_proj.bias mixer.k_proj.bias mixer.v_proj.bias", ROWS, QKV),
        Row("self_attention.linear_proj.weight", "mixer.o_proj.weight", COLUMNS),
        Row("self_attention.linear_proj.bias", "mixer.o_proj.bias", COPY),
    ),
    "-": (
        Row("mlp.linear_fc1.layer_norm_weight", "norm.weight", COPY, others=("pre_mlp_layernorm.weight",)),
        Row("mlp.linear_fc1.weight", "mixer.up_proj.weight", ROWS),
        Row("mlp.linear_fc1.bias", "mixer.up_proj.bias", ROWS),
        Row("mlp.linear_fc2.weight", "mixer.down_proj.weight", COLUMNS),
        Row("mlp.linear_fc2.bias", "mixer.down_proj.bias", COPY),
    ),
    "E": (
        Row("pre_mlp_layernorm.weight", "norm.weight", COPY),
        Row("mlp.router.weight", "mixer.gate.weight", COPY),
        Row("mlp.router.expert_bias", "mixer.gate.e_score_correction_bias", COPY),
        Row("mlp.fc1_latent_proj.weight", "mixer.fc1_latent_proj.weight", COPY),
        Row("mlp.fc2_latent_proj.weight", "mixer.fc2_latent_proj.weight", COPY),
        Row("mlp.experts.linear_fc1.weight{e}", "mixer.experts.{e}.up_proj.weight", ROWS,
            others=("mlp.experts.local_experts.{e}.linear_fc1.weight", "mlp.experts.{e}.linear_fc1.weight",
                    "mlp.experts.experts.{e}.linear_fc1.weight")),
        Row("mlp.experts.linear_fc2.weight{e}", "mixer.experts.{e}.down_proj.weight", COLUMNS,
            others=("mlp.experts.local_experts.{e}.linear_fc2.weight", "mlp.experts.{e}.linear_fc2.weight",
                    "mlp.experts.experts.{e}.linear_fc2.weight")),
        Row("mlp.shared_experts.linear_fc1.weight", "mixer.shared_experts.up_proj.weight", ROWS),
        Row("mlp.shared_experts.linear_fc2.weight", "mixer.shared_experts.down_proj.weight", COLUMNS),
    ),
}  # fmt: skip
MTP_FIRST = (
    Row("enorm.weight", "enorm.weight", COPY),
    Row("hnorm.weight", "hnorm.weight", COPY),
    Row("eh_proj.weight", "eh_proj.weight", ROWS),
)
MTP_LAST = (Row("final_layernorm.weight", "final_layernorm.weight", COPY),)

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
    groups: tuple[int, int] | None = None  # of QKV and HEADS: number of key/value groups, head_dim
    stack: tuple[int, int] | None = None  # in a vision tower: the layer, and how many there are

    @property
    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the HF tensors."""
        if self.layout == QKV:
            return tuple((size, *self.shape[1:]) for _, size in self.parts)
        return ((1, *self.shape) if self.layout == FLAT else self.shape,)


# What may differ by layer: MLPs by their shapes, experts by Megatron-Bridge's `per_layer_config_overrides`.
BY_LAYER = ("intermediate_size", "moe_intermediate_size", "num_experts_per_tok")


def links(config: NemotronHConfig) -> Iterator[Link]:
    """Every tensor of a model of this configuration, in order of depth; raises as `check_sizes`."""
    check_sizes(config)
    for link in _links(config):
        groups = (config.num_key_value_heads, config.head_dim) if link.layout == QKV else None
        yield link._replace(hf=tuple(name_in_file(name, config.model_type) for name in link.hf), groups=groups)


def check_sizes(config: NemotronHConfig) -> None:
    """Raise a ValueError for sizes that differ by layer where Megatron has one, and for a sliding window."""
    config.require_uniform(*(field for field in config.PER_LAYER_FIELDS if field not in BY_LAYER))
    if config.sliding_window is not None:
        raise ValueError(f"sliding_window={config.sliding_window}: allowed is null here, Megatron's layers have none")


def _links(config: NemotronHConfig) -> Iterator[Link]:
    embeddings, final_norm, output_layer = TOP
    outside = sizes(config, None)
    yield _link(embeddings, "", "", outside)
    for layer, letter in enumerate(config.hybrid_override_pattern):
        prefixes = (f"decoder.layers.{layer}.", f"backbone.layers.{layer}.")
        for link in _block(config, letter, *prefixes, layer):
            yield link._replace(layer=layer)
    yield _link(final_norm, "", "", outside)
    if not config.tie_word_embeddings:
        yield _link(output_layer, "", "", outside)
    yield from _mtp(config)


def _block(config: NemotronHConfig, letter: str, megatron: str, hf: str, layer: int) -> Iterator[Link]:
    of = sizes(config, layer)
    for row in BLOCKS[letter]:
        if all(is_there(config, tensor, layer) for tensor in row.hf_rows):
            for expert in range(of["e"]) if "{e}" in row.megatron else (None,):
                yield _link(row, megatron, hf, of, expert)


def _mtp(config: NemotronHConfig) -> Iterator[Link]:
    pattern = config.mtp_hybrid_override_pattern
    for depth in range(config.num_nextn_predict_layers):
        for inner, letter in enumerate(pattern):
            hf, megatron = f"mtp.layers.{depth * len(pattern) + inner}.", f"mtp.layers.{depth}."
            layer = config.num_hidden_layers + inner
            for row in MTP_FIRST if inner == 0 else ():
                yield _link(row, megatron, hf, sizes(config, layer))
            yield from _block(config, letter, f"{megatron}mtp_model_layer.layers.{inner}.", hf, layer)
            for row in MTP_LAST if inner == len(pattern) - 1 else ():
                yield _link(row, megatron, hf, sizes(config, layer))


def _link(row: Row, megatron: str, hf: str, of: dict[str, int], expert: int | None = None) -> Link:
    shape = row.shape
    return Link(
        megatron=tuple(megatron + name.replace("{e}", str(expert)) for name in (row.megatron, *row.others)),
        hf=tuple(hf + name.replace("{e}", str(expert)) for name in row.hf.split()),
        shape=tuple(sum(of[letter] for letter in letters) for letters in shape),
        parts=tuple((letter, of[letter]) for letter in shape[0]),
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
