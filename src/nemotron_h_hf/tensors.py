"""The one table of what a checkpoint of a configuration consists of: its tensors, and the axes that a smaller model has less of.

Costs, cuts, masks, scores and the shapes of conversion derive from it: a new tensor is a row of `TENSORS`, a new axis one of
`AXES`. Nothing is allocated. Sizes may be scalar tensors, a router's expected ones; hence `reduce`, which adds no factor of 1.
A shape has a word for each axis of the tensor, in the letters below; `+` joins parts that lie one after another on an axis.

    V  vocabulary                          q  query heads x head_dim
    d  hidden channels                     k, v  key/value heads x head_dim
    f  neurons of an MLP                   e  routed experts
    z, x  Mamba heads x head_dim           w  neurons of one of them
    B, C  Mamba groups x state             s  neurons of the shared expert
    dt  Mamba heads                        l  latent size, d without one
    t  taps of the convolution
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add, mul
from typing import NamedTuple

from .model.configuration_nemotron_h import NemotronHConfig
from .model.weights import Name, read_name, stays_float32

# Letter -> the fields of the configuration whose product it is, from the outermost in.
LETTERS = {
    "1": "", "V": "vocab_size", "d": "hidden_size", "f": "intermediate_size",
    "z": "mamba_num_heads mamba_head_dim", "x": "mamba_num_heads mamba_head_dim",
    "B": "n_groups ssm_state_size", "C": "n_groups ssm_state_size", "dt": "mamba_num_heads", "t": "conv_kernel",
    "q": "num_attention_heads head_dim", "k": "num_key_value_heads head_dim", "v": "num_key_value_heads head_dim",
    "e": "n_routed_experts", "w": "moe_intermediate_size", "s": "moe_shared_expert_intermediate_size",
    "l": "moe_latent_size",
}  # fmt: skip


class Axis(NamedTuple):
    """One thing that a smaller model has fewer of: `field` of the configuration counts it, in each layer of `kind` (None: once).

    `groups` is the field that counts the groups into which it falls; as many stay of each. Where it is counted in each member
    of another axis (`within`), each member may keep its own.
    """

    name: str
    field: str
    kind: str | None
    title: str
    groups: str = ""
    within: str = ""


AXES = (
    Axis("hidden", "hidden_size", None, "hidden channels"),
    Axis("neurons", "intermediate_size", "mlp", "MLP neurons"),
    Axis("heads", "mamba_num_heads", "linear_attention", "Mamba heads", groups="n_groups"),
    Axis("channels", "mamba_head_dim", "linear_attention", "channels of a Mamba head", within="heads"),
    Axis("key_value_heads", "num_key_value_heads", "full_attention", "key/value heads"),
    Axis("query_heads", "num_attention_heads", "full_attention", "query heads", groups="num_key_value_heads"),
    Axis("experts", "n_routed_experts", "moe", "experts", groups="n_group"),
    Axis("expert_neurons", "moe_intermediate_size", "moe", "neurons of a routed expert", within="experts"),
    Axis("shared_neurons", "moe_shared_expert_intermediate_size", "moe", "neurons of the shared expert"),
)
AXIS_OF = {axis.field: axis for axis in AXES}


class Row(NamedTuple):
    """One tensor by its name in its layer (`{e}` for the number of an expert); `needs` are fields that must be set."""

    name: str
    shape: str
    kind: str
    needs: str = ""


def _linear(name: str, shape: str, kind: str, bias: str, needs: str = "") -> tuple[Row, Row]:
    """A matrix, and the bias that it has where the field `bias` is set."""
    return Row(f"{name}.weight", shape, kind, needs), Row(f"{name}.bias", shape.split()[0], kind, f"{bias} {needs}")


_NORM = Row("norm.weight", "d", "norms")
TENSORS: dict[str, tuple[Row, ...]] = {
    "first": (Row("backbone.embeddings.weight", "V d", "embeddings"),),
    "linear_attention": (
        _NORM,
        *_linear("mixer.in_proj", "z+x+B+C+dt d", "mamba", "use_bias"),
        Row("mixer.conv1d.weight", "x+B+C 1 t", "mamba"),
        Row("mixer.conv1d.bias", "x+B+C", "mamba", "use_conv_bias"),
        Row("mixer.A_log", "dt", "mamba"),
        Row("mixer.D", "dt", "mamba"),
        Row("mixer.dt_bias", "dt", "mamba"),
        Row("mixer.norm.weight", "x", "mamba"),
        *_linear("mixer.out_proj", "d x", "mamba", "use_bias"),
    ),
    "full_attention": (
        _NORM,
        *_linear("mixer.q_proj", "q d", "attention", "attention_bias"),
        *_linear("mixer.k_proj", "k d", "attention", "attention_bias"),
        *_linear("mixer.v_proj", "v d", "attention", "attention_bias"),
        *_linear("mixer.o_proj", "d q", "attention", "attention_bias"),
    ),
    "mlp": (
        _NORM,
        *_linear("mixer.up_proj", "f d", "mlp", "mlp_bias"),
        *_linear("mixer.down_proj", "d f", "mlp", "mlp_bias"),
    ),
    "moe": (
        _NORM,
        Row("mixer.gate.weight", "e d", "moe_router"),
        Row("mixer.gate.e_score_correction_bias", "e", "moe_router"),
        Row("mixer.experts.{e}.up_proj.weight", "w l", "moe_routed"),
        Row("mixer.experts.{e}.down_proj.weight", "l w", "moe_routed"),
        *_linear("mixer.fc1_latent_proj", "l d", "moe_latent", "mlp_bias", "moe_latent_size"),
        *_linear("mixer.fc2_latent_proj", "d l", "moe_latent", "mlp_bias", "moe_latent_size"),
        *_linear("mixer.shared_experts.up_proj", "s d", "moe_shared", "mlp_bias"),
        *_linear("mixer.shared_experts.down_proj", "d s", "moe_shared", "mlp_bias"),
    ),
    "last": (Row("backbone.norm_f.weight", "d", "norms"), Row("lm_head.weight", "V d", "lm_head")),
    # Multi-token prediction: in front of its first layer's tensors, and of its last one's
    "mtp_first": (
        Row("eh_proj.weight", "d d+d", "mtp"),
        Row("enorm.weight", "d", "mtp"),
        Row("hnorm.weight", "d", "mtp"),
    ),
    "mtp_last": (Row("final_layernorm.weight", "d", "mtp"),),
}
"""Kind of layer -> its tensors; first and last are those outside of the layers."""
ROWS = {row.name: row for rows in TENSORS.values() for row in rows}
_LETTERS_OF = {
    kind: {letter for row in rows for letter in row.shape.replace("+", " ").split()} for kind, rows in TENSORS.items()
}


class WeightShape(NamedTuple):
    """One tensor of a checkpoint, or `copies` alike ones, one for each expert.

    `layer` is the stack's, or past it one of the pattern of multi-token prediction; None outside of layers.
    """

    place: Name
    row: Row
    shape: tuple[int, ...]
    copies: int = 1
    layer: int | None = None

    @property
    def name(self) -> str:
        """As released, with `{e}` for the number of an expert."""
        return self.place.template

    @property
    def kind(self) -> str:
        """What its parameters are counted as: `mtp` for all of multi-token prediction."""
        return "mtp" if self.place.root == "mtp" else self.row.kind

    @property
    def stack_layer(self) -> int | None:
        """The layer of the stack; None outside of it, multi-token prediction included."""
        return self.layer if self.place.root == "backbone" else None

    @property
    def num_elements(self) -> int:
        """Elements over all copies."""
        return reduce(mul, self.shape) * self.copies

    @property
    def in_float32(self) -> bool:
        """Whether it is stored in float32 next to weights of any dtype."""
        return stays_float32(self.row.name)

    def places(self) -> Iterator[Name]:
        """The name of each copy."""
        numbers = range(self.copies) if "{e}" in self.row.name else (None,)
        return (self.place._replace(expert=number) for number in numbers)


def checkpoint_tensors(config: NemotronHConfig) -> Iterator[WeightShape]:
    """Every tensor of a released-style checkpoint of `config`, in order of depth."""
    yield from _outside(config, "first")
    for layer, kind in enumerate(config.layers_block_type):
        yield from _layer(config, "backbone", layer, layer, TENSORS[kind])
    yield from _outside(config, "last")
    pattern = config.mtp_layers_block_type or ()
    for number in range(config.num_nextn_predict_layers * len(pattern)):
        inner = number % len(pattern)
        rows = TENSORS["mtp_first"] if inner == 0 else ()
        rows += TENSORS["mtp_last"] if inner == len(pattern) - 1 else ()
        yield from _layer(config, "mtp", number, config.num_hidden_layers + inner, rows + TENSORS[pattern[inner]])


def sizes(config: NemotronHConfig, layer: int | None) -> dict[str, int]:
    """Size of each letter that the tensors of a layer have; None: of those outside of the layers."""
    kind = "last" if layer is None else kind_of(config, layer)
    return {
        letter: reduce(mul, [size(config, field, layer) for field in fields_of(config, letter, layer)] or [1])
        for letter in _LETTERS_OF[kind]
    }


def size(config: NemotronHConfig, field: str, layer: int | None) -> int:
    """A field of the configuration in one layer."""
    value = getattr(config, field)
    return config.size(field, layer) if isinstance(value, list) else value


def fields_of(config: NemotronHConfig, letter: str, layer: int | None) -> list[str]:
    """The fields whose product a letter is in a layer, from the outermost in."""
    return LETTERS["d" if letter == "l" and not size(config, "moe_latent_size", layer) else letter].split()


def kind_of(config: NemotronHConfig, layer: int) -> str:
    """What a layer is, of the stack, or past it of multi-token prediction."""
    return [*config.layers_block_type, *(config.mtp_layers_block_type or ())][layer]


def num_groups(config: NemotronHConfig, field: str) -> int:
    """How many groups a size falls into, of each of which as many stay; 1 where it has none."""
    groups = AXIS_OF[field].groups if field in AXIS_OF else ""
    return getattr(config, groups) if groups else 1


def axes_of(kind: str) -> Iterator[Axis]:
    """The axes that layers of a kind have to themselves."""
    return (axis for axis in AXES if axis.kind == kind)


def together(field: str) -> list[Axis]:
    """The axis of a field, with those that are ordered with it: heads and their channels, groups and what is in them."""
    return [axis for axis in AXES if _leader(axis) == _leader(AXIS_OF[field])]


def _leader(axis: Axis) -> str:
    return axis.within or (AXIS_OF[axis.groups].name if axis.groups in AXIS_OF else axis.name)


def is_there(config: NemotronHConfig, row: Row, layer: int) -> bool:
    """Whether a layer of a model of `config` has the tensor."""
    return all(size(config, need, layer) for need in row.needs.split())


def _outside(config: NemotronHConfig, part: str) -> Iterator[WeightShape]:
    for row in TENSORS[part]:
        if row.kind != "lm_head" or not config.tie_word_embeddings:
            yield WeightShape(read_name(row.name), row, _shape(row, sizes(config, None)))


def _layer(config: NemotronHConfig, root: str, number: int, layer: int, rows: tuple[Row, ...]) -> Iterator[WeightShape]:
    of = sizes(config, layer)
    for row in rows:
        if is_there(config, row, layer):
            copies = of["e"] if "{e}" in row.name else 1
            yield WeightShape(Name(root, number, row.name), row, _shape(row, of), copies, layer)


def _shape(row: Row, of: dict[str, int]) -> tuple[int, ...]:
    return tuple(reduce(add, [of[letter] for letter in word.split("+")]) for word in row.shape.split())
