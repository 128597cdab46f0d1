"""The configuration of a vision-language model on Nemotron-H: a vision tower, a projector, a language model.

One class, under three `model_type`s. The papers' own form (NVLM-D: InternViT, tiles with tags) is `nemotron_h_vl`. The two
released families spell some fields of config.json in other ways; each is written back as it was read:

    nemotron_h_vl                       text_config, vision_config, image_token_id, image_size
    NemotronH_Nano_VL_V2                llm_config, img_context_token_id, force_image_size, vision_config of RADIO's own code
    NemotronH_Nano_Omni_Reasoning_V3    either spelling; its audio part is not loaded
"""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .configuration_checks import is_count
from .configuration_nemotron_h import NemotronHConfig

# Field -> its name in released files. The first that is found is read; the same one is written.
RELEASED = {
    "text_config": ("llm_config",),
    "image_token_id": ("img_context_token_id",),
    "image_size": ("force_image_size",),
    "image_mean": ("norm_mean",),
    "image_std": ("norm_std",),
    "audio_config": ("sound_config",),
}
# timm's names of RADIO's shapes, as `args.model` of a vision_config: hidden_size, layers, heads
VIT_SHAPES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
NORMS = ("rms_norm", "layer_norm")


class NemotronHVLConfig(PreTrainedConfig):
    """Configuration of a vision-language model; the defaults are the 8B of arXiv 2504.03624 with InternViT-300M.

    Args:
        text_config: of the language model, a `NemotronHConfig` or its fields.
        vision_config: of the tower, any that `AutoModel` knows (`internvl_vision`, `radio`); the default is InternViT-300M.
        image_token_id: the token that stands once for each embedding of an image.
        image_size: side of a tile, in pixels.
        downsample_ratio: of the grid of patches, by the pixel shuffle; 0.5 makes one embedding of 2 x 2 patches.
        projector_hidden_size, projector_hidden_act, projector_norm, projector_norm_eps: norm -> Linear -> act -> Linear.
        max_tiles, use_thumbnail, use_tile_tags: how the processor cuts and writes an image.
        dynamic_resolution: images are one grid of patches each, in any size, and no tiles.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    model_type = "nemotron_h_vl"
    sub_configs = {"text_config": NemotronHConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 131072
    image_size: int | None = 448
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    downsample_ratio: float = 0.5
    projector_hidden_size: int = 21504
    projector_hidden_act: str = "relu2"
    projector_norm: str = "rms_norm"
    projector_norm_eps: float = 1e-5
    max_tiles: int = 12
    use_thumbnail: bool = True
    use_tile_tags: bool = True
    dynamic_resolution: bool = False
    audio_config: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        spellings = {}
        for field, names in RELEASED.items():
            for name in names:
                if name in kwargs:
                    spellings[field] = name
                    setattr(self, field, kwargs.pop(name))
        self._spellings = spellings
        text = self.text_config or {}
        self.text_config = text if isinstance(text, NemotronHConfig) else NemotronHConfig(**_without_type(text))
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.vision_config = self._read_tower(self.vision_config)
        super().__post_init__(**kwargs)
        _validate(self)

    def validate(self) -> None:
        """Check every field again; transformers calls it before saving."""
        _validate(self)

    def _read_tower(self, tower: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        if isinstance(tower, PreTrainedConfig):
            return tower
        kind = (tower or {}).get("model_type") or "internvl_vision"
        default = {"attention_bias": True} if kind == "internvl_vision" else {}
        return AutoConfig.for_model(kind, **{**default, **_without_type(tower or {})})

    # Derived sizes, each computed in one place.

    @property
    def tower_width(self) -> int:
        """Width of the tower's patches."""
        return self.vision_config.hidden_size

    @property
    def merge_size(self) -> int:
        """Patches on a side of the square that becomes one embedding."""
        return round(1 / self.downsample_ratio)

    @property
    def patch_side(self) -> int:
        """Of a patch, in pixels."""
        side = self.vision_config.patch_size
        return side if isinstance(side, int) else side[0]

    @property
    def image_seq_length(self) -> int:
        """Embeddings of one tile."""
        return (self.image_size // self.patch_side // self.merge_size) ** 2

    @property
    def initializer_range(self) -> float:
        """Of fresh weights, the language model's."""
        return self.text_config.initializer_range

    @property
    def use_cache(self) -> bool:
        """The language model's."""
        return self.text_config.use_cache

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        self.text_config.use_cache = value

    @property
    def has_final_norm(self) -> bool:
        """Whether there is a norm between tower and projector: in omni models whose language model predicts several tokens."""
        return False

    # Writing.

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`, with every field under the name that it was read by."""
        output = super().to_dict()
        spellings = output.pop("_spellings", self._spellings)
        empty = ("audio_config", "image_mean", "image_std")
        output = {name: value for name, value in output.items() if value is not None or name not in empty}
        return {spellings.get(name, name): value for name, value in output.items()}


class NemotronHNanoVLConfig(NemotronHVLConfig):
    """Nemotron Nano 12B v2 VL's config.json: RADIO, tiles of 512 without tags."""

    model_type = "NemotronH_Nano_VL_V2"

    image_size: int | None = 512
    projector_hidden_size: int = 20480
    use_tile_tags: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        width = kwargs.get("vit_hidden_size", kwargs.get("vision_hidden_size"))
        if kwargs.get("ps_version", "v2") != "v2":
            raise ValueError(f"ps_version={kwargs['ps_version']!r}: allowed is 'v2'")
        super().__post_init__(**kwargs)
        self._spellings = {field: names[0] for field, names in RELEASED.items()} | self._spellings
        if width is not None and width != self.tower_width:
            raise ValueError(f"vit_hidden_size={width}: allowed is {self.tower_width}, the width of vision_config")

    def _read_tower(self, tower: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        """RADIO's own config.json names a shape of timm's and the side of its position table."""
        if isinstance(tower, PreTrainedConfig):
            return tower
        args = (tower or {}).get("args") or {}
        found: dict[str, Any] = dict(self.tower_defaults)
        shape = next((size for name, size in VIT_SHAPES.items() if name in str(args.get("model", "vit_huge"))), None)
        if shape is not None:
            found |= dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads"), shape))
        if "cpe_max_size" in args:
            found["max_img_size"] = args["cpe_max_size"]
        return AutoConfig.for_model("radio", **{**found, **_without_type(tower or {})})

    @property
    def tower_defaults(self) -> dict[str, Any]:
        """Fields of RADIO that its own config.json leaves out."""
        return {}


class NemotronHOmniConfig(NemotronHNanoVLConfig):
    """Nemotron 3 Nano Omni's config.json: RADIO, images in their own resolution, audio and video besides."""

    model_type = "NemotronH_Nano_Omni_Reasoning_V3"

    projector_hidden_size: int = 4096
    image_token_id: int = 18
    dynamic_resolution: bool = True

    @property
    def tower_defaults(self) -> dict[str, Any]:
        return {"video_temporal_patch_size": 2}

    @property
    def has_final_norm(self) -> bool:
        return self.text_config.num_nextn_predict_layers > 0


def _without_type(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "model_type"}


def _validate(config: NemotronHVLConfig) -> None:
    def require(condition: bool, field: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{field}={getattr(config, field)!r}: allowed is {allowed}")

    ratio = config.downsample_ratio
    require(isinstance(ratio, float) and 0 < ratio <= 1 and math.isclose(1 / ratio, round(1 / ratio)), "downsample_ratio",
            "one over a whole number, such as 0.5")  # fmt: skip
    for field in ("projector_hidden_size", "max_tiles"):
        require(is_count(getattr(config, field)), field, "a positive integer")
    token = config.image_token_id
    require(isinstance(token, int) and not isinstance(token, bool) and token >= 0, "image_token_id", "a token's number")
    side = config.patch_side * config.merge_size
    whole = config.image_size is None if config.dynamic_resolution else False
    require(whole or (is_count(config.image_size) and config.image_size % side == 0), "image_size",
            f"a multiple of {side}, patch_size / downsample_ratio")  # fmt: skip
    require(config.projector_hidden_act in ACT2FN, "projector_hidden_act", f"one of {', '.join(sorted(ACT2FN))}")
    require(config.projector_norm in NORMS, "projector_norm", f"one of {', '.join(NORMS)}")
    eps = config.projector_norm_eps
    require(isinstance(eps, float) and 0 < eps < 1, "projector_norm_eps", "a small positive number")
    tiles = config.max_tiles <= 12 or not config.use_tile_tags
    require(tiles, "max_tiles", "at most 12 with tile tags, which have two digits and are named up to <tile_12>")
