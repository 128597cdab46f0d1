"""Multimodal checkpoints: Megatron's arguments and the shapes of tensors to a configuration, and a configuration to arguments.

Sizes of a tower that shapes do not show are constants in Megatron-LM's multimodal example; they are here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from nemotron_h_hf.inputs import read_json
from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig
from nemotron_h_hf.model.configuration_nemotron_h_vl import RELEASED, NemotronHNanoVLConfig, NemotronHVLConfig
from nemotron_h_hf.model.image_processing_nemotron_h_vl import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

from . import config as configs
from .source_checkpoint import SourceCheckpoint, naming
from .vision import LANGUAGE, PROJECTOR, TOWER, Config, layer_of, require_expressible


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
ARCHITECTURES = {
    NemotronHVLConfig: "NemotronHVLForConditionalGeneration",
    NemotronHNanoVLConfig: "NemotronH_Nano_VL_V2",
}


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

    layers = {layer_of(name) for name in checkpoint} - {None}
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
