"""The facts of a vision-language model's vision part, from its configuration: tower, projector, tokens per picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModel

from .model.configuration_nemotron_h_vl import NemotronHVLConfig
from .model.modeling_nemotron_h_vl import NemotronHVLProjector


@dataclass(frozen=True)
class VisionFacts:
    """Counts are exact. `tokens_per_tile` and `max_tiles` are None with dynamic resolution; `max_tiles` counts the thumbnail."""

    model_type: str
    tower: str
    tower_layers: int
    tower_width: int
    tower_parameters: int
    projector: str
    projector_parameters: int
    image_size: int | None
    tokens_per_tile: int | None
    max_tiles: int | None
    tile_tags: bool

    @property
    def tokens_per_image(self) -> str:
        """In words."""
        if self.tokens_per_tile is None:
            return "as many as its resolution has"
        least, most = self.tokens_per_tile, self.tokens_per_tile * self.max_tiles
        tags = " and a tag for each tile" if self.tile_tags else ""
        return (
            f"{least:,} per tile of {self.image_size} pixels, 1 to {self.max_tiles} tiles: {least:,} to {most:,}{tags}"
        )


def describe_vision(config: NemotronHVLConfig) -> VisionFacts:
    """Facts of tower and projector; neither is given memory."""
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config)
        projector = NemotronHVLProjector(config)
    width, text = config.tower_width * config.merge_size**2, config.text_config
    norm = "RMSNorm" if config.projector_norm == "rms_norm" else "LayerNorm"
    tiles = None if config.dynamic_resolution else config.max_tiles + config.use_thumbnail * (config.max_tiles > 1)
    return VisionFacts(
        model_type=config.model_type,
        tower=config.vision_config.model_type,
        tower_layers=config.vision_config.num_hidden_layers,
        tower_width=config.tower_width,
        tower_parameters=sum(weight.numel() for weight in tower.parameters()),
        projector=f"{norm}, {width} -> {config.projector_hidden_size} ({config.projector_hidden_act}) -> {text.hidden_size}",
        projector_parameters=sum(weight.numel() for weight in projector.parameters()),
        image_size=config.image_size,
        tokens_per_tile=None if config.dynamic_resolution else config.image_seq_length,
        max_tiles=tiles,
        tile_tags=config.use_tile_tags,
    )
