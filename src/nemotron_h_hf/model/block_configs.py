"""The layout of the released Puzzle model: `block_configs`, an entry for each layer with its sizes, in place of a pattern.

    {"block_type": "mamba"}
    {"block_type": "attention", "sliding_window": 4096}                            # the window only where there is one
    {"block_type": "mlp", "intermediate_size": 80}
    {"block_type": "moe", "moe_intermediate_size": 1280, "num_experts_per_tok": 8, ...}

`mtp_block_configs` has an entry for each layer of multi-token prediction. A field that blocks have is not at the top level of
config.json. `unpack_blocks` reads them into the lists that NemotronHConfig takes, `pack_blocks` is the way back.
"""

from collections.abc import Mapping
from typing import Any

LEGACY_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}
"""The released names of kinds of layers -> transformers' names; mlp and moe are the same in both."""
RELEASED_TYPES = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp", "moe": "moe"}

# What every block of a kind must have, itself or from the top level.
REQUIRED = {
    "mlp": ("intermediate_size",),
    "moe": ("moe_intermediate_size", "num_experts_per_tok", "n_routed_experts", "moe_shared_expert_intermediate_size"),
}
OPTIONAL = ("sliding_window", "moe_latent_size")  # None where a block has none
# What a block may say as well, if all blocks of its kind say the same.
ALIKE = {
    "linear_attention": ("ssm_state_size",),
    "moe": ("routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob"),
}
LAYOUT_FIELDS = ("block_configs", "mtp_block_configs")


def unpack_blocks(fields: Mapping[str, Any], per_layer: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a config.json with lists of sizes in place of its blocks; the same fields if it has no blocks.

    A list has an entry for each layer of its kind, those of multi-token prediction last; where all agree it is one value.
    `blockwise` in the result names the fields that the blocks had.

    Args:
        per_layer: field that may differ by layer -> its kind of layer.

    Raises:
        ValueError: naming the block, the field, the value and what is allowed.
    """
    if fields.get("block_configs") is None:
        return {name: value for name, value in fields.items() if name not in LAYOUT_FIELDS}
    names = {kind: [field for field, own in per_layer.items() if own == kind] for kind in RELEASED_TYPES}
    depth = fields.get("num_nextn_predict_layers") or 0
    blocks = _kinds_of(fields, "block_configs", names)
    mtp_blocks = (
        _kinds_of(fields, "mtp_block_configs", names) if depth and fields.get("mtp_block_configs") is not None else []
    )
    unpacked = {name: value for name, value in fields.items() if name not in LAYOUT_FIELDS}
    unpacked["layers_block_type"] = [kind for _, kind, _ in blocks]
    if mtp_blocks:
        unpacked["mtp_layers_block_type"] = [kind for _, kind, _ in mtp_blocks]
    unpacked["blockwise"] = []
    for kind, own in names.items():
        entries = [(place, block) for place, found, block in [*blocks, *mtp_blocks] if found == kind]
        for field in (*own, *ALIKE.get(kind, ())):
            if any(block.get(field) is not None for _, block in entries):
                unpacked["blockwise"].append(field)
            elif field not in REQUIRED.get(kind, ()):
                continue
            values = [_value(place, block, field, fields, own) for place, block in entries]
            if all(value == values[0] for value in values):
                unpacked |= {field: values[0]} if values else {}
            elif field in own:
                unpacked[field] = values
            else:
                raise ValueError(f"{field}={values} in the blocks of kind {kind}: allowed is one value for all of them")
    return unpacked


def pack_blocks(config: Any, blockwise: list[str]) -> dict[str, Any]:
    """What replaces the layers and the sizes of `config` in its file: blocks and lists of kinds, in the released names.

    Args:
        config: NemotronHConfig.
        blockwise: fields to say by block; a field that differs by layer always is.
    """
    count, kinds = config.num_hidden_layers, config.layers_block_type
    mtp_kinds = config.mtp_layers_block_type or []
    packed = {
        "layers_block_type": [RELEASED_TYPES[kind] for kind in kinds],
        "block_configs": [_block(config, index, kind, blockwise) for index, kind in enumerate(kinds)],
    }
    if mtp_kinds:
        packed["mtp_layers_block_type"] = [RELEASED_TYPES[kind] for kind in mtp_kinds]
        packed["mtp_block_configs"] = [
            _block(config, count + index, kind, blockwise) for index, kind in enumerate(mtp_kinds)
        ]
    return packed


def _block(config: Any, index: int, kind: str, blockwise: list[str]) -> dict[str, Any]:
    own = [field for field, found in config.PER_LAYER_FIELDS.items() if found == kind]
    sizes = {
        field: config.size(field, index)
        for field in own
        if field in blockwise or isinstance(getattr(config, field), list)
    }
    sizes |= {field: getattr(config, field) for field in ALIKE.get(kind, ()) if field in blockwise}
    return {"block_type": RELEASED_TYPES[kind], **{field: value for field, value in sizes.items() if value is not None}}


def _kinds_of(fields: Mapping[str, Any], name: str, names: Mapping[str, list[str]]) -> list[tuple[str, str, Mapping]]:
    """(place, kind, block) of each block of a list, after a check of what it is and of the names of its fields."""
    blocks, found = fields[name], []
    if not isinstance(blocks, (list, tuple)) or not blocks:
        raise ValueError(f"{name}={blocks!r}: allowed is a list with a block for each layer")
    for index, block in enumerate(blocks):
        place = f"{name}[{index}]"
        known = block.get("block_type") if isinstance(block, Mapping) else None
        kind = plain_kind(known) if isinstance(known, str) else None
        if kind not in names:
            raise ValueError(f"{place}={block!r}: allowed is a block_type of {', '.join(RELEASED_TYPES.values())}")
        for field, value in block.items():
            allowed = ("block_type", *names[kind], *ALIKE.get(kind, ()))
            if field not in allowed and value is not None:
                raise ValueError(
                    f"{place}.{field}={value!r}: allowed in a block of type {known} are {', '.join(allowed)}"
                )
        found.append((place, kind, block))
    layers = "layers_block_type" if name == "block_configs" else "mtp_layers_block_type"
    if (listed := fields.get(layers)) is not None:
        own = [kind for _, kind, _ in found]
        if not isinstance(listed, (list, tuple)) or list(map(plain_kind, listed)) != own:
            raise ValueError(
                f"{layers}={listed!r}: allowed is what {name} says, {[RELEASED_TYPES[kind] for kind in own]}"
            )
    return found


def plain_kind(name: Any) -> Any:
    """transformers' name of a kind of layer; what is no name stays as it is."""
    return LEGACY_TYPES.get(name, name) if isinstance(name, str) else name


def _value(place: str, block: Mapping[str, Any], field: str, fields: Mapping[str, Any], sizes: list[str]) -> Any:
    """What a block says of a field, or the top level where it says nothing."""
    value = block.get(field)
    if value is None and not isinstance(fields.get(field), list):
        value = fields.get(field)
    if value is None:
        if field in OPTIONAL:
            return None
        raise ValueError(f"{place} has no {field}, and neither has the top level: allowed is a value in one of them")
    if field in sizes and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        raise ValueError(f"{place}.{field}={value!r}: allowed is a positive integer")
    return value
