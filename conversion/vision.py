"""Multimodal checkpoints: names, shapes and arguments of Megatron's LLaVA model, whose language model is a hybrid one.

    language_model.‹as in names.py›        language_model.backbone.*, language_model.lm_head.weight
    vision_model.‹row›                     vision_model.‹InternViT's or RADIO's own names›
    vision_projection.encoder.‹row›        mlp1.{0,1,3}.weight

From Megatron-LM's multimodal example and the vision models of megatron-core: sizes of a tower that shapes do not show are
constants there. A distributed checkpoint has the tower's layers as one stack, `vision_model.decoder.layers.‹row›`, with the
layer on the first axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from nemotron_h_hf.inputs import read_json
from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.configuration_nemotron_h_vl import (
    RELEASED,
    NemotronHNanoVLConfig,
    NemotronHOmniConfig,
    NemotronHVLConfig,
)
from nemotron_h_hf.model.image_processing_nemotron_h_vl import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

from . import config as configs
from . import names
from .names import COLUMNS, COPY, FLAT, HEADS, PLAIN, ROWS, Link, Place, Row
from .source_checkpoint import SourceCheckpoint, naming

LANGUAGE, TOWER, PROJECTOR = "language_model.", "vision_model.", "vision_projection.encoder."
Config = NemotronHConfig | NemotronHVLConfig


class Tower(NamedTuple):
    """What Megatron's constants say of a vision model type."""

    kind: str  # model_type of its configuration here
    hidden_size: int
    num_heads: int
    act: str
    mean: list[float]
    std: list[float]


TOWERS = {
    "internvit300M": Tower("internvl_vision", 1024, 16, "gelu", IMAGENET_MEAN, IMAGENET_STD),
    "radio": Tower("radio", 1280, 16, "gelu_pytorch_tanh", CLIP_MEAN, CLIP_STD),
    "cradio-g": Tower("radio", 1536, 24, "gelu_pytorch_tanh", CLIP_MEAN, CLIP_STD),
}
# language model type -> what Megatron sets whatever the training arguments say
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "nemotron5-hybrid-8b": {"ffn_hidden_size": 21504},
    "nemotron5-hybrid-12b": {"ffn_hidden_size": 20480, "mamba_state_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80},
    "nemotron5-hybrid-56b": {"ffn_hidden_size": 32768, "mamba_state_dim": 256},
}  # fmt: skip
SQUARED_RELU = {"squared_relu": True, "swiglu": False, "gated_linear_unit": False}
# argument -> the only value with which the model is the one that is read here
REQUIRED = {
    "pixel_shuffle": True,
    "disable_vision_class_token": True,
    "vision_projection_type": "mlp",
    "conv_merging": False,
    "dynamic_resolution": False,
    "radio_disable_cpe": False,
    "radio_interpolate_only_cpe": False,
    "radio_cpe_aspect_ratio_select": False,
    "sound_model_type": None,
}

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


# Reading a configuration.


def derive(
    checkpoint: SourceCheckpoint, extra: str | Path | None = None, tokenizer: str | Path | None = None
) -> tuple[NemotronHVLConfig, list[str]]:
    """The configuration of a multimodal Megatron checkpoint, and remarks on what was not given, as `config.derive`.

    `tokenizer` is a folder whose tokenizer has <image>; without one its number has to be in `extra`, a config.json.

    Raises:
        ValueError: naming the argument, tensor or field that is missing or does not fit, and the checkpoint.
    """
    with naming(checkpoint.path):
        given = read_given(extra)
        text, said = configs.derive(_language_part(checkpoint), extra if given is None else given.text)
        text.architectures = None
        args = checkpoint.args
        for argument, allowed in REQUIRED.items():
            if args.get(argument, allowed) != allowed:
                raise ValueError(f"the argument {argument} is {args[argument]!r}: allowed is {allowed!r}")
        tower, more = _derive_tower(checkpoint, given)
        fields = {"text_config": text, "vision_config": tower, **_derive_rest(checkpoint, given, text)}
        fields["image_token_id"] = _image_token(given, tokenizer)
        kind = NemotronHVLConfig if given is None else type(given.config)
        config = kind(**fields, architectures=[ARCHITECTURES[kind]], dtype=text.dtype)
        require_expressible(config)
        return config, [*said, *more]


ARCHITECTURES = {
    NemotronHVLConfig: "NemotronHVLForConditionalGeneration",
    NemotronHNanoVLConfig: "NemotronH_Nano_VL_V2",
}


class Given(NamedTuple):
    """A vision-language model's config.json: as a configuration, and as it was written."""

    config: NemotronHVLConfig
    fields: dict[str, Any]

    def says(self, field: str) -> bool:
        """Whether the file itself has this field, under any of its names."""
        return any(name in self.fields for name in (field, *RELEASED.get(field, ())))

    @property
    def text(self) -> dict[str, Any]:
        """What it has of the language model."""
        return next((self.fields[name] for name in ("text_config", "llm_config") if name in self.fields), {})


def read_given(extra: str | Path | None) -> Given | None:
    """A vision-language model's config.json, or None where `extra` is nothing or speaks of a text model."""
    path = None if extra is None else Path(extra)
    path = path / "config.json" if path is not None and path.is_dir() else path
    if path is None or not path.is_file():
        return None
    fields = read_json(path)
    if not {"vision_config", "image_token_id", "img_context_token_id"} & set(fields):
        return None
    kind = fields.get("model_type", NemotronHVLConfig.model_type)
    config = AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if name != "model_type"})
    if type(config) not in ARCHITECTURES:
        raise ValueError(f"{path}: model_type={kind!r}: allowed are nemotron_h_vl and NemotronH_Nano_VL_V2")
    return Given(config, fields)


def _language_part(checkpoint: SourceCheckpoint) -> SourceCheckpoint:
    """The language model's tensors under their names without a tower; arguments as Megatron's example has them in the end."""
    args = dict(checkpoint.args)
    kind = args.get("language_model_type")
    if kind in LANGUAGE_MODELS:
        args |= LANGUAGE_MODELS[kind] | SQUARED_RELU
    elif kind is not None and kind != "nemotron6-moe":
        allowed = ", ".join([*LANGUAGE_MODELS, "nemotron6-moe"])
        raise ValueError(f"the argument language_model_type is {kind!r}: allowed are {allowed}")
    entries = {
        name.removeprefix(LANGUAGE): entry for name, entry in checkpoint.entries.items() if name.startswith(LANGUAGE)
    }
    return SourceCheckpoint(checkpoint.path, checkpoint.format, entries, args)


def _derive_tower(checkpoint: SourceCheckpoint, given: Given | None) -> tuple[Any, list[str]]:
    kind = checkpoint.args.get("vision_model_type")
    if kind is not None and kind not in TOWERS:
        raise ValueError(f"the argument vision_model_type is {kind!r}: allowed are {', '.join(TOWERS)}")
    first = [name for name in (f"{TOWER}conv1.weight", f"{TOWER}embedder.weight") if name in checkpoint]
    if len(first) != 1:
        raise ValueError(
            f"{TOWER}conv1.weight (InternViT) or {TOWER}embedder.weight (RADIO) is missing, or both are there"
        )
    internvit = first[0].endswith("conv1.weight")
    known = "internvl_vision" if internvit else "radio"
    if kind is not None and TOWERS[kind].kind != known:
        raise ValueError(f"the argument vision_model_type is {kind!r}, but its tensors are those of {known}")
    if given is not None and given.config.vision_config.model_type != known:
        raise ValueError(
            f"--config has a vision_config of {given.config.vision_config.model_type}, the tensors are of {known}"
        )
    found = _tower_sizes(checkpoint, internvit)
    width = found["hidden_size"]
    base = {} if given is None else given.config.vision_config.to_dict()
    base.pop("model_type", None)
    tower = TOWERS[kind] if kind in TOWERS else None
    said = []
    if base:
        for field in ("hidden_size", "num_hidden_layers", "patch_size"):
            stated, there = (
                value[0] if isinstance(value, (list, tuple)) else value for value in (base[field], found[field])
            )
            if stated != there:
                raise ValueError(f"vision_config.{field} is {stated} by --config, {there} by the tensors")
        said += [] if tower is None or base["hidden_act"] == tower.act else [
            f"vision_config.hidden_act={base['hidden_act']!r} is --config's; Megatron's {kind} has {tower.act!r}"
        ]  # fmt: skip
    elif tower is None or tower.hidden_size != width:
        raise ValueError(f"the number of heads of a tower of width {width} is not in the checkpoint; give a config.json with "
                         "vision_config by --config")  # fmt: skip
    else:
        base = {"num_attention_heads": tower.num_heads, "hidden_act": tower.act}
    default = {"attention_bias": True} if internvit else {}
    return AutoConfig.for_model(known, **{**default, **base, **found}), said


def _tower_sizes(checkpoint: SourceCheckpoint, internvit: bool) -> dict[str, Any]:
    """What the shapes of the tower's tensors say."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        spec = checkpoint.spec(TOWER + name) if TOWER + name in checkpoint else None
        if spec is None or len(spec.shape) != axes:
            raise ValueError(f"{TOWER}{name} is {'missing' if spec is None else f'of shape {spec.shape}'}: allowed are "
                             f"tensors of {axes} axes")  # fmt: skip
        return spec.shape

    layers = {int(name.split(".")[3]) for name in checkpoint if _LAYER.match(name)}
    inner = shape("decoder.layers.0.mlp.linear_fc1.weight", 2)[0]
    if internvit:
        width, _, patch, _ = shape("conv1.weight", 4)
        side = round((shape("position_embeddings.weight", 2)[0] - 1) ** 0.5) * patch
        found = {"intermediate_size": inner, "image_size": [side, side], "patch_size": [patch, patch]}
    else:
        width, pixels = shape("embedder.weight", 2)
        patch = round((pixels / 3) ** 0.5)
        side = round(shape("position_embeddings", 3)[1] ** 0.5) * patch
        classes = min(3, shape("class_token", 2)[0])
        registers = shape("class_token", 2)[0] - classes
        found = {"mlp_ratio": inner / width, "max_img_size": side, "patch_size": patch, "num_cls_tokens": classes,
                 "num_registers": registers}  # fmt: skip
    return {**found, "hidden_size": width, "num_hidden_layers": len(layers)}


def _derive_rest(checkpoint: SourceCheckpoint, given: Given | None, text: NemotronHConfig) -> dict[str, Any]:
    """Projector and tiles; of tiles --config has the last word, as they are no weights."""
    args, name = checkpoint.args, PROJECTOR + "linear_fc1.weight"
    if name not in checkpoint:
        raise ValueError(f"{name} is missing")
    found: dict[str, Any] = {}
    kind = TOWERS.get(args.get("vision_model_type"))
    if kind is not None:
        found |= {"image_mean": kind.mean, "image_std": kind.std}
    if args.get("img_h") != args.get("img_w"):
        raise ValueError(f"the arguments img_h={args.get('img_h')} and img_w={args.get('img_w')}: allowed are squares")
    tiles = {"use_thumbnail": "use_thumbnail", "use_tile_tags": "use_tile_tags", "image_size": "img_h"}
    found |= {field: args[argument] for field, argument in tiles.items() if args.get(argument) is not None}
    if args.get("max_num_tiles") is not None:
        found["max_tiles"] = args["max_num_tiles"] if args.get("use_tiling", True) else 1
    for field in ("image_size", "image_mean", "image_std", "max_tiles", "use_thumbnail", "use_tile_tags"):
        if given is not None and given.says(field):
            found[field] = getattr(given.config, field)
    if "image_size" not in found:
        raise ValueError("image_size, the side of a tile, is not in the arguments (img_h); give it by --config")
    return {
        **found,
        "projector_hidden_size": checkpoint.spec(name).shape[0],
        "projector_norm_eps": text.layer_norm_epsilon,
        "downsample_ratio": 0.5,
    }


def _image_token(given: Given | None, tokenizer: str | Path | None) -> int:
    if given is not None and given.says("image_token_id"):
        return given.config.image_token_id
    if tokenizer is not None:
        known = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
        if "<image>" in known:
            return known["<image>"]
        raise ValueError(
            f"--tokenizer {tokenizer} has no token <image>: allowed is one that has, as Megatron trained with it"
        )
    raise ValueError("image_token_id is not in a Megatron checkpoint; give a --tokenizer that has <image>, or a config.json "
                     "of a vision-language model by --config")  # fmt: skip


def to_args(config: Config) -> dict[str, Any]:
    """Arguments of a multimodal checkpoint that is written, besides those of its language model."""
    if not isinstance(config, NemotronHVLConfig):
        return {}
    tower, text = config.vision_config, config.text_config
    sizes = (tower.hidden_size, tower.num_attention_heads, tower.model_type)
    kind = next((name for name, it in TOWERS.items() if (it.hidden_size, it.num_heads, it.kind) == sizes), None)
    by_width = {fields["ffn_hidden_size"]: name for name, fields in LANGUAGE_MODELS.items()}
    return {
        "vision_model_type": kind,
        "language_model_type": by_width.get(text.intermediate_size),
        "vision_projection_type": "mlp",
        "pixel_shuffle": True,
        "disable_vision_class_token": True,
        "class_token_len": tower.num_cls_tokens + tower.num_registers if tower.model_type == "radio" else None,
        "img_h": config.image_size,
        "img_w": config.image_size,
        "patch_dim": config.patch_side,
        "use_tiling": config.max_tiles > 1,
        "max_num_tiles": config.max_tiles,
        "use_thumbnail": config.use_thumbnail,
        "use_tile_tags": config.use_tile_tags,
        "special_tokens": ["<image>"],
    }
