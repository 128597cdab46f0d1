"""Cutting a model out of a larger one: which rows and columns of each of its tensors stay, and the tensors that this gives.

    kept = prefix(parent_config, budget.layers, child_config)    # or any other `Kept`: pruning, or a permutation of everything
    for cut in cuts(parent_config, kept): child[cut.name] = cut.of(parent[cut.source])

What is kept is said in the parent's own indices, layer by layer: one operation serves nested budgets (prefixes),
pruning (any indices) and reordering (all indices, in another order). It is exact: heads of a Mamba group share B, C and the
norm, so the same number stays in every group; a head's channels share only scalars, so each head may keep its own; query
heads stay with their key/value head. Names are those of checkpoint files.

    d hidden, f neurons, i = heads x head_dim, h heads, g groups x state, k key/value heads x head_dim, a query heads x
    head_dim, e experts, w an expert's neurons, s the shared expert's neurons, l latent
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cost import checkpoint_tensors
from .model.configuration_nemotron_h import NemotronHConfig

# What the rows (and columns) of a tensor run over; None for an axis that is never cut. in_proj's rows are gate, x, B, C, dt.
AXES: dict[str, tuple[str | None, ...]] = {
    "embeddings.weight": (None, "d"), "lm_head.weight": (None, "d"), "norm_f.weight": ("d",),
    "norm.weight": ("d",), "enorm.weight": ("d",), "hnorm.weight": ("d",), "final_layernorm.weight": ("d",),
    "eh_proj.weight": ("d", "dd"),
    "mixer.in_proj.weight": ("iigh", "d"), "mixer.in_proj.bias": ("iigh",),
    "mixer.conv1d.weight": ("ig",), "mixer.conv1d.bias": ("ig",),
    "mixer.A_log": ("h",), "mixer.D": ("h",), "mixer.dt_bias": ("h",), "mixer.norm.weight": ("i",),
    "mixer.out_proj.weight": ("d", "i"), "mixer.out_proj.bias": ("d",),
    "mixer.q_proj.weight": ("a", "d"), "mixer.q_proj.bias": ("a",),
    "mixer.k_proj.weight": ("k", "d"), "mixer.k_proj.bias": ("k",),
    "mixer.v_proj.weight": ("k", "d"), "mixer.v_proj.bias": ("k",),
    "mixer.o_proj.weight": ("d", "a"), "mixer.o_proj.bias": ("d",),
    "mixer.up_proj.weight": ("f", "d"), "mixer.up_proj.bias": ("f",),
    "mixer.down_proj.weight": ("d", "f"), "mixer.down_proj.bias": ("d",),
    "mixer.gate.weight": ("e", "d"), "mixer.gate.e_score_correction_bias": ("e",),
    "mixer.experts.up_proj.weight": ("w", "l"), "mixer.experts.down_proj.weight": ("l", "w"),
    "mixer.fc1_latent_proj.weight": (None, "d"), "mixer.fc1_latent_proj.bias": (None,),
    "mixer.fc2_latent_proj.weight": ("d", None), "mixer.fc2_latent_proj.bias": ("d",),
    "mixer.shared_experts.up_proj.weight": ("s", "d"), "mixer.shared_experts.up_proj.bias": ("s",),
    "mixer.shared_experts.down_proj.weight": ("d", "s"), "mixer.shared_experts.down_proj.bias": ("d",),
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What stays, as indices (int64) in the parent. The mappings are by the parent's layer; MTP layers follow the stack.

    hidden (d); neurons (f); heads (h), as many from each Mamba group, group by group; channels (h, p) of each kept head;
    key_value_heads (k); query_heads, as many of each key/value head, in the order of those; experts (e), as many of each expert group;
    expert_neurons (e, w) of each kept expert; shared_neurons (s).
    """

    layers: tuple[int, ...]
    hidden: Tensor
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    heads: Mapping[int, Tensor] = field(default_factory=dict)
    channels: Mapping[int, Tensor] = field(default_factory=dict)
    key_value_heads: Mapping[int, Tensor] = field(default_factory=dict)
    query_heads: Mapping[int, Tensor] = field(default_factory=dict)
    experts: Mapping[int, Tensor] = field(default_factory=dict)
    expert_neurons: Mapping[int, Tensor] = field(default_factory=dict)
    shared_neurons: Mapping[int, Tensor] = field(default_factory=dict)


class Cut(NamedTuple):
    """One tensor of the small model: `source` in the parent, and the rows and columns of it that stay (None: all)."""

    name: str
    source: str
    shape: tuple[int, ...]
    rows: Tensor | None
    columns: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """The small tensor, as a copy."""
        if self.rows is not None:
            tensor = tensor.index_select(0, self.rows.to(tensor.device))
        if self.columns is not None:
            tensor = tensor.index_select(1, self.columns.to(tensor.device))
        return tensor if self.rows is not None or self.columns is not None else tensor.clone()


def everything(config: NemotronHConfig) -> Kept:
    """All of a model, in its own order."""
    return prefix(config, range(config.num_hidden_layers), config)


def prefix(parent: NemotronHConfig, layers: Sequence[int], child: NemotronHConfig) -> Kept:
    """The first of everything, inside its group where there are groups, in the sizes of `child`, whose layers are `layers`."""
    kept: dict[str, dict[int, Tensor]] = {name: {} for name in ("neurons", "heads", "channels", "key_value_heads",
                                                                "query_heads", "experts", "expert_neurons",
                                                                "shared_neurons")}  # fmt: skip
    for index, own, kind in _layer_pairs(parent, layers, child):
        if kind == "mlp":
            kept["neurons"][index] = torch.arange(child.size("intermediate_size", own))
        elif kind == "linear_attention":
            sizes = (config.size("mamba_num_heads", at) for config, at in ((parent, index), (child, own)))
            heads = kept["heads"][index] = first_of_each_group(*sizes, parent.n_groups)
            kept["channels"][index] = torch.arange(child.size("mamba_head_dim", own)).expand(len(heads), -1)
        elif kind == "full_attention":
            size, groups = child.size("num_attention_heads", own), child.num_key_value_heads
            heads = torch.arange(parent.size("num_attention_heads", index)).view(parent.num_key_value_heads, -1)
            kept["key_value_heads"][index] = torch.arange(groups)
            kept["query_heads"][index] = heads[:groups, : size // groups].flatten()
        else:
            experts = first_of_each_group(parent.n_routed_experts, child.n_routed_experts, parent.n_group)
            kept["experts"][index] = experts
            kept["expert_neurons"][index] = torch.arange(child.moe_intermediate_size).expand(len(experts), -1)
            kept["shared_neurons"][index] = torch.arange(child.moe_shared_expert_intermediate_size)
    return Kept(tuple(layers), torch.arange(child.hidden_size), **kept)


def first_of_each_group(size: int, kept: int, num_groups: int) -> Tensor:
    """The first kept / num_groups of each of the groups that 0..size-1 falls into: (kept) int64."""
    return torch.arange(size).view(num_groups, -1)[:, : kept // num_groups].flatten()


def kept_config(parent: NemotronHConfig, kept: Kept) -> NemotronHConfig:
    """The configuration of what stays, without budgets."""
    entry = entry_without_sizes(parent, kept.layers)
    entry["hidden_size"] = len(kept.hidden)
    stack = set(kept.layers)

    def sizes(of: Mapping[int, Tensor], dim: int = 0) -> list[int]:
        return [indices.shape[dim] for index, indices in sorted(of.items()) if index in stack]

    per_layer = {"intermediate_size": sizes(kept.neurons), "mamba_num_heads": sizes(kept.heads),
                 "mamba_head_dim": sizes(kept.channels, 1), "num_attention_heads": sizes(kept.query_heads)}  # fmt: skip
    entry |= {name: (found[0] if len(set(found)) == 1 else found) for name, found in per_layer.items() if found}
    alike = {"num_key_value_heads": sizes(kept.key_value_heads), "n_routed_experts": sizes(kept.experts),
             "moe_intermediate_size": sizes(kept.expert_neurons, 1),
             "moe_shared_expert_intermediate_size": sizes(kept.shared_neurons)}  # fmt: skip
    for name, found in alike.items():
        if len(set(found)) > 1:
            raise ValueError(f"{name}={found}: allowed is one size for every layer")
        if found:
            entry[name] = found[0]
    return type(parent).from_dict(entry)


def entry_without_sizes(parent: NemotronHConfig, layers: Sequence[int]) -> dict[str, Any]:
    """The parent's configuration with these of its layers and without budgets; its sizes are still the parent's."""
    entry = parent.to_dict()
    for derived in ("elastic", "hybrid_override_pattern", "num_hidden_layers"):
        entry.pop(derived, None)
    return {**entry, "layers_block_type": [parent.layers_block_type[index] for index in layers]}


def cuts(parent: NemotronHConfig, kept: Kept, child: NemotronHConfig | None = None) -> Iterator[Cut]:
    """Every tensor of the small model in the order of its depth, with where it comes from.

    Raises:
        ValueError: if `kept` does not give the shapes that `child` (by default `kept_config`) asks for.
    """
    child = kept_config(parent, kept) if child is None else child
    for tensor in checkpoint_tensors(child):
        match = re.match(r"(.*\blayers\.)(\d+)\.", tensor.name)
        index = None if match is None else _parent_layer(parent, child, kept, match[1], int(match[2]))
        for copy in range(tensor.copies):
            name = tensor.name.format(e=copy)
            expert = copy if tensor.copies > 1 or "{e}" in tensor.name else None
            source = name if match is None else _source_name(parent, kept, name, match, index, expert)
            place = re.sub(r"^(backbone\.)?((mtp\.)?layers\.\d+\.)?|experts\.\{e\}\.", _without_number, tensor.name)
            letters = (*AXES[place], None)
            rows, columns = (_indices(parent, kept, letter, index, expert) for letter in letters[:2])
            shape = (tensor.shape[0] if rows is None else len(rows),)
            shape += tuple(tensor.shape[1:2]) if columns is None else (len(columns),)
            if (*shape, *tensor.shape[2:]) != tensor.shape:
                raise ValueError(
                    f"{name} would be {shape} from what is kept, the configuration asks for {tensor.shape}"
                )
            yield Cut(name, source, tensor.shape, rows, columns)


def runs(indices: Tensor) -> list[tuple[int, int]]:
    """Indices as [start, stop) runs of successive ones, in order: what can be read or viewed in one piece."""
    breaks = (torch.nonzero(indices.diff() != 1).flatten() + 1).tolist()
    starts, stops = [0, *breaks], [*breaks, len(indices)]
    return [(int(indices[start]), int(indices[stop - 1]) + 1) for start, stop in zip(starts, stops)]


def _layer_pairs(
    parent: NemotronHConfig, layers: Sequence[int], child: NemotronHConfig
) -> Iterator[tuple[int, int, str]]:
    """(layer in the parent, layer in the child, kind), multi-token prediction after the stack."""
    yield from ((index, own, parent.layers_block_type[index]) for own, index in enumerate(layers))
    for step, kind in enumerate(parent.mtp_layers_block_type or []):
        yield parent.num_hidden_layers + step, child.num_hidden_layers + step, kind


def _parent_layer(parent: NemotronHConfig, child: NemotronHConfig, kept: Kept, prefix: str, own: int) -> int:
    """Where `kept` says what stays of the child's layer `own`; the depths of MTP repeat one pattern of layers."""
    if prefix.startswith("mtp."):
        return parent.num_hidden_layers + own % len(child.mtp_layers_block_type)
    return kept.layers[own]


def _source_name(
    parent: NemotronHConfig, kept: Kept, name: str, match: re.Match, index: int, expert: int | None
) -> str:
    """The name in the parent of a layer's tensor."""
    number = match[2] if match[1].startswith("mtp.") else str(index)
    rest = name[match.end() :]
    if expert is not None:
        rest = rest.replace(f"experts.{expert}.", f"experts.{int(kept.experts[index][expert])}.", 1)
    return f"{match[1]}{number}.{rest}"


def _without_number(match: re.Match) -> str:
    return "experts." if match[0].startswith("experts") else ""


def _indices(
    parent: NemotronHConfig, kept: Kept, letters: str | None, index: int | None, expert: int | None
) -> Tensor | None:
    """The rows (or columns) that stay, of consecutive blocks: one letter each, see the head of the file."""
    if letters is None or letters == "l":
        return None if letters is None or parent.moe_latent_size else kept.hidden
    if letters in ("d", "dd"):
        return kept.hidden if letters == "d" else torch.cat([kept.hidden, parent.hidden_size + kept.hidden])
    simple = {"f": kept.neurons, "e": kept.experts, "s": kept.shared_neurons}
    if letters in simple:
        return simple[letters][index]
    if letters == "w":
        return kept.expert_neurons[index][expert]
    if letters in "ak":
        heads = kept.query_heads if letters == "a" else kept.key_value_heads
        return (heads[index][:, None] * parent.head_dim + torch.arange(parent.head_dim)).flatten()
    return _mamba_indices(parent, kept, letters, index)


def _mamba_indices(parent: NemotronHConfig, kept: Kept, letters: str, index: int) -> Tensor:
    """Rows of a tensor that packs a Mamba layer's blocks: i channels of the heads, g all of B and C, h heads."""
    heads, state = kept.heads[index], 2 * parent.n_groups * parent.ssm_state_size
    inner = (heads[:, None] * parent.size("mamba_head_dim", index) + kept.channels[index]).flatten()
    blocks = {"i": (inner, parent.mamba_width(index)), "g": (torch.arange(state), state),
              "h": (heads, parent.size("mamba_num_heads", index))}  # fmt: skip
    parts, start = [], 0
    for letter in letters:
        indices, width = blocks[letter]
        parts.append(start + indices)
        start += width
    return torch.cat(parts)
