"""Multimodal checkpoints: names and shapes of Megatron's LLaVA model, whose language model is a hybrid one.

    language_model.‹as in names.py›        language_model.backbone.*, language_model.lm_head.weight
    vision_model.‹row›                     vision_model.‹InternViT's or RADIO's own names›
    vision_projection.encoder.‹row›        mlp1.{0,1,3}.weight

From Megatron-LM's multimodal example and the vision models of megatron-core. A distributed checkpoint has the tower's layers as
one stack, `vision_model.decoder.layers.‹row›`, with the layer on the first axis. Arguments are in vision_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.configuration_nemotron_h_vl import NemotronHOmniConfig, NemotronHVLConfig

from . import names
from .names import COLUMNS, COPY, FLAT, HEADS, PLAIN, ROWS, Link, Place, Row

LANGUAGE, TOWER, PROJECTOR = "language_model.", "vision_model.", "vision_projection.encoder."
Config = NemotronHConfig | NemotronHVLConfig


BLOCK = {
    "norm1.weight": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", COPY, PLAIN),
    "norm1.bias": ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias", COPY, PLAIN),
    "attn.qkv.weight": ("self_attention.linear_qkv.weight", "", ROWS, HEADS),
    "attn.qkv.bias": ("self_attention.linear_qkv.bias", "", ROWS, HEADS),
    "attn.proj.weight": ("self_attention.linear_proj.weight", "", COLUMNS, PLAIN),
    "attn.proj.bias": ("self_attention.linear_proj.bias", "", COPY, PLAIN),
    "norm2.weight": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", COPY, PLAIN),
    "norm2.bias": ("pre_mlp_layernorm.bias", "mlp.linear_fc1.layer_norm_bias", COPY, PLAIN),
    "mlp.fc1.weight": ("mlp.linear_fc1.weight", "", ROWS, PLAIN),
    "mlp.fc1.bias": ("mlp.linear_fc1.bias", "", ROWS, PLAIN),
    "mlp.fc2.weight": ("mlp.linear_fc2.weight", "", COLUMNS, PLAIN),
    "mlp.fc2.bias": ("mlp.linear_fc2.bias", "", COPY, PLAIN),
}
"""HF name -> Megatron's with its own norms, with norms inside of Transformer Engine's linears, split, layout."""
LAYER = tuple(
    Row(own, hf, split, layout, (fused,) if fused else ()) for hf, (own, fused, split, layout) in BLOCK.items()
)
INTERNVIT_LAYER = (*LAYER, Row("ls1", "ls1", COPY), Row("ls2", "ls2", COPY))
INTERNVIT_TOP = (
    Row("class_token", "embeddings.class_embedding", COPY),
    Row("conv1.weight", "embeddings.patch_embedding.weight", COPY),
    Row("conv1.bias", "embeddings.patch_embedding.bias", COPY),
    Row("position_embeddings.weight", "embeddings.position_embedding", COPY, FLAT),
)
RADIO_TOP = (
    Row("class_token", "patch_generator.cls_token.token", COPY),
    Row("embedder.weight", "patch_generator.embedder.weight", ROWS),
    Row("position_embeddings", "patch_generator.pos_embed", COPY),
)
PROJECTION = (
    Row("linear_fc1.layer_norm_weight", "mlp1.0.weight", COPY),
    Row("linear_fc1.weight", "mlp1.1.weight", ROWS),
    Row("linear_fc2.weight", "mlp1.3.weight", COLUMNS),
)
NOT_IN_MEGATRON = ("vision_model.radio_model.input_conditioner.", "vision_model.radio_model.summary_idxs")
EXTRA_STATE_LAYER = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
                     "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip
EXTRA_STATE_PROJECTION = ("linear_fc1", "linear_fc2")
_LAYER = re.compile(r"vision_model\.decoder\.layers\.\d+\.")
_STACK = re.compile(r"(vision_model\.decoder\.layers)\.(?!\d+\.)(.+)")


def language(config: Config) -> NemotronHConfig:
    """The configuration of the language model, which may be all there is."""
    return config.text_config if isinstance(config, NemotronHVLConfig) else config


def prefix(config: Config) -> str:
    """What stands before the language model's names, on both sides."""
    return LANGUAGE if isinstance(config, NemotronHVLConfig) else ""


def is_multimodal(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a Megatron checkpoint has a tower."""
    return any(name.startswith((LANGUAGE, TOWER, "vision_projection.")) for name in checkpoint)


def links(config: Config) -> Iterator[Link]:
    """Every tensor of a model, as `names.links`; of one that sees, tower and projector come first."""
    if not isinstance(config, NemotronHVLConfig):
        yield from names.links(config)
        return
    require_expressible(config)
    yield from _tower_links(config)
    yield from _projector_links(config)
    for link in names.links(config.text_config):
        yield link._replace(
            megatron=tuple(LANGUAGE + name for name in link.megatron), hf=tuple(LANGUAGE + name for name in link.hf)
        )


def _tower_links(config: NemotronHVLConfig) -> Iterator[Link]:
    tower, width = config.vision_config, config.tower_width
    internvit = tower.model_type == "internvl_vision"
    patch = config.patch_side
    if internvit:
        grid = [side // patch for side in tower.image_size]
        sizes = {
            "class_token": (1, 1, width),
            "conv1.weight": (width, tower.num_channels, patch, patch),
            "conv1.bias": (width,),
            "position_embeddings.weight": (grid[0] * grid[1] + 1, width),
        }
    else:
        sizes = {
            "class_token": (tower.num_cls_tokens + tower.num_registers, width),
            "embedder.weight": (width, tower.num_channels * patch * patch),
            "position_embeddings": (1, (tower.max_img_size // patch) ** 2, width),
        }
    hf = TOWER if internvit else TOWER + "radio_model.model."
    for row in INTERNVIT_TOP if internvit else RADIO_TOP:
        yield _link(row, TOWER, hf, sizes[row.megatron])
    layers = f"{hf}encoder.layers." if internvit else f"{hf}blocks."
    for layer in range(tower.num_hidden_layers):
        for row in INTERNVIT_LAYER if internvit else LAYER:
            at = (f"{TOWER}decoder.layers.{layer}.", f"{layers}{layer}.", _shape(row.hf, width, mlp_width(tower)))
            link = _link(row, *at)._replace(stack=(layer, tower.num_hidden_layers))
            if row.layout == HEADS:
                link = link._replace(groups=(tower.num_attention_heads, width // tower.num_attention_heads))
            # RADIO is trained with Transformer Engine's fused norms, InternViT's layers have their own
            yield link if internvit else link._replace(megatron=link.megatron[::-1])


def _projector_links(config: NemotronHVLConfig) -> Iterator[Link]:
    wide, inner = config.tower_width * config.merge_size**2, config.projector_hidden_size
    shapes = ((wide,), (inner, wide), (config.text_config.hidden_size, inner))
    for row, shape in zip(PROJECTION, shapes, strict=True):
        yield _link(row, PROJECTOR, "", shape)


def _shape(hf: str, width: int, inner: int) -> tuple[int, ...]:
    """Of a tensor of a layer of a tower, by its HF name."""
    module, _, kind = hf.rpartition(".")
    rows = {"attn.qkv": 3 * width, "mlp.fc1": inner}.get(module, width)
    columns = {"attn.qkv": width, "attn.proj": width, "mlp.fc1": width, "mlp.fc2": inner}.get(module)
    return (rows, columns) if kind == "weight" and columns else (rows,)


def mlp_width(tower: Any) -> int:
    """Of the layers of a tower."""
    return int(tower.hidden_size * tower.mlp_ratio) if tower.model_type == "radio" else tower.intermediate_size


def _link(row: Row, megatron: str, hf: str, shape: tuple[int, ...]) -> Link:
    spellings = tuple(megatron + name for name in (row.megatron, *row.others))
    return Link(spellings, (hf + row.hf,), shape, (("rows", shape[0]),), row.split, row.layout)


def place(name: str) -> Place | None:
    """As `names.place`, also of a multimodal checkpoint's names."""
    if name.startswith(LANGUAGE):
        spot = names.place(name.removeprefix(LANGUAGE))
        return spot and spot._replace(prefix=LANGUAGE + spot.prefix)
    found = _LAYER.match(name)
    start = found[0] if found else PROJECTOR if name.startswith(PROJECTOR) else TOWER
    if not name.startswith(start):
        return names.place(name)
    rows = INTERNVIT_LAYER if found else PROJECTION if start == PROJECTOR else (*INTERNVIT_TOP, *RADIO_TOP)
    rest = name.removeprefix(start)
    row = next((row for row in rows if rest in (row.megatron, *row.others)), None)
    return row and Place(row, start, None)


def layer_of(name: str) -> int | None:
    """The number of the tower's layer that a tensor is of."""
    found = _LAYER.match(name)
    return int(found[0].split(".")[3]) if found else None


def stack_of(key: str) -> tuple[str, str] | None:
    """The two halves of a distributed key that holds all layers of the tower; the number of a layer goes between them."""
    found = _STACK.fullmatch(key)
    return found and (found[1], found[2])


def extra_states(config: Config) -> Iterator[tuple[str, int]]:
    """Names of the extra states of tower and projector in a distributed checkpoint, and of how many layers each is."""
    if isinstance(config, NemotronHVLConfig):
        for name in EXTRA_STATE_LAYER:
            yield f"{TOWER}decoder.layers.{name}._extra_state", config.vision_config.num_hidden_layers
        for name in EXTRA_STATE_PROJECTION:
            yield f"{PROJECTOR}{name}._extra_state", 1


def require_expressible(config: NemotronHVLConfig) -> None:
    """ValueError for what Megatron's multimodal example has no argument for; it would build another model."""
    tower, text = config.vision_config, config.text_config

    def require(found: Any, field: str, allowed: Any) -> None:
        if found != allowed:
            raise ValueError(f"{field}={found!r}: allowed is {allowed!r}, which Megatron's multimodal models have")

    if isinstance(config, NemotronHOmniConfig):
        raise ValueError(f"model_type={config.model_type!r}: allowed are nemotron_h_vl and NemotronH_Nano_VL_V2")
    if tower.model_type not in ("internvl_vision", "radio"):
        raise ValueError(f"vision_config.model_type={tower.model_type!r}: allowed are 'internvl_vision' and 'radio'")
    fields = {
        "internvl_vision": {
            "attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm", "use_mask_token": False,
            "use_absolute_position_embeddings": True, "use_mean_pooling": True, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        },
        "radio": {"qkv_bias": True, "use_swiglu_ffn": False, "video_temporal_patch_size": None, "layer_norm_eps": 1e-6},
    }  # fmt: skip
    for field, allowed in fields[tower.model_type].items():
        require(getattr(tower, field), f"vision_config.{field}", allowed)
    require(config.downsample_ratio, "downsample_ratio", 0.5)
    require(config.dynamic_resolution, "dynamic_resolution", False)
    require(config.projector_norm, "projector_norm", "rms_norm")
    require(config.projector_hidden_act, "projector_hidden_act", "relu2")
    require(config.projector_norm_eps, "projector_norm_eps", text.layer_norm_epsilon)
    require(text.num_nextn_predict_layers, "num_nextn_predict_layers", 0)
    require(config.tower_width % tower.num_attention_heads, "vision_config.hidden_size % num_attention_heads", 0)


def check_ranks(config: Config, tp: int) -> None:
    """ValueError when the heads of the tower cannot be shared by the tensor-parallel ranks."""
    if isinstance(config, NemotronHVLConfig) and config.vision_config.num_attention_heads % tp:
        heads = config.vision_config.num_attention_heads
        raise ValueError(f"tp={tp}: allowed are divisors of the {heads} heads of the vision tower")


def remarks(config: Config) -> list[str]:
    """What a Megatron checkpoint of this model computes otherwise."""
    if isinstance(config, NemotronHVLConfig) and config.vision_config.model_type == "radio":
        act = config.vision_config.hidden_act
        if act != "gelu_pytorch_tanh":
            return [f"the weights are the same, but Megatron's RADIO has GELU by tanh, this one hidden_act={act!r}"]
    return []
