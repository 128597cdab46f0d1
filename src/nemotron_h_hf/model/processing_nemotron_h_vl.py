"""Text and pictures to the inputs of the model: each `<image>` of a prompt becomes its picture's tiles, with tags in plain text.

    NVLM       <Image><tile_01><image>...<image><tile_02><image>...<tile_global_thumbnail><image>...</Image>
    released   <img><image>...<image></img>

A picture of one tile has the thumbnail's tag. The tags are ordinary text of equal length in tokens.
"""

from typing import Any

from transformers.processing_utils import MultiModalData, ProcessorMixin

from .configuration_nemotron_h_vl import NemotronHVLConfig
from .image_processing_nemotron_h_vl import NemotronHVLImageProcessor

CHAT_PREAMBLE = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}{%- if message.content is string or message.content is none -%}"
    "{%- set flat.messages = flat.messages + [message] -%}{%- else -%}{%- set flat.text = '' -%}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}{%- set flat.text = flat.text + '<image>' -%}"
    "{%- elif part.type == 'text' -%}{%- set flat.text = flat.text + part.text -%}{%- endif -%}{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
"""In front of a text model's chat template: contents that are lists of texts and images become strings with `<image>`."""


class NemotronHVLProcessor(ProcessorMixin):
    """Tokenizer and image processor together.

    Args:
        use_tile_tags: tags in front of every tile; by default unless the tokenizer has the `<img>` of the released models.
        tile_tag, thumbnail_tag: the tags; `{:02d}` stands for a tile's number. NVLM-1.0 has `<tile_{}>`.
        image_start, image_end: around a picture; by default `<Image>` with tags and `<img>` without.

    Raises:
        ValueError: if the tokenizer has no `<image>` token, or tags differ in length.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        use_tile_tags: bool | None = None,
        tile_tag: str = "<tile_{:02d}>",
        thumbnail_tag: str = "<tile_global_thumbnail>",
        image_start: str | None = None,
        image_end: str | None = None,
        **_: Any,
    ) -> None:
        words = tokenizer.get_vocab()
        self.image_token = "<image>"
        if self.image_token not in words:
            raise ValueError("the tokenizer has no token <image>: tokenizer.add_special_tokens adds one")
        self.image_token_id = words[self.image_token]
        self.use_tile_tags = "<img>" not in words if use_tile_tags is None else use_tile_tags
        self.tile_tag, self.thumbnail_tag = tile_tag, thumbnail_tag
        self.image_start = image_start or ("<Image>" if self.use_tile_tags else "<img>")
        self.image_end = image_end or ("</Image>" if self.use_tile_tags else "</img>")
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)
        if self.use_tile_tags and not image_processor.dynamic_resolution:
            self._check_tags()

    @classmethod
    def of_model(cls, config: NemotronHVLConfig, tokenizer: Any) -> "NemotronHVLProcessor":
        """As a model's configuration says; a chat template of the language model takes pictures from now on."""
        images = NemotronHVLImageProcessor(
            image_size=config.image_size, patch_size=config.patch_side, downsample_ratio=config.downsample_ratio,
            max_tiles=config.max_tiles, use_thumbnail=config.use_thumbnail, image_mean=config.image_mean,
            image_std=config.image_std,
        )  # fmt: skip
        template = tokenizer.chat_template
        if template is not None and not template.startswith(CHAT_PREAMBLE):
            tokenizer.chat_template = CHAT_PREAMBLE + template
        return cls(images, tokenizer, use_tile_tags=config.use_tile_tags)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_: Any) -> str:
        """What replaces a picture in the text: its tiles' tokens and tags, or its patches' tokens."""
        if "image_grid_hw" in image_inputs:
            count = self.image_processor.num_tokens(int(image_inputs["image_grid_hw"][image_idx].prod()))
            return self.image_start + self.image_token * count + self.image_end
        tile = self.image_token * self.image_processor.num_tokens(1)
        num_tiles = int(image_inputs["num_tiles"][image_idx])
        tags = self.tags(num_tiles) if self.use_tile_tags else [""] * num_tiles
        return self.image_start + "".join(tag + tile for tag in tags) + self.image_end

    def tags(self, num_tiles: int) -> list[str]:
        """The tags of a picture's tiles, the thumbnail's last.

        Raises:
            ValueError: for more tiles than there are tags.
        """
        thumbnail = num_tiles == 1 or self.image_processor.use_thumbnail
        numbered = num_tiles - thumbnail
        if numbered > 12:
            raise ValueError(f"a picture of {num_tiles} tiles: allowed with tile tags are 12 and a thumbnail")
        return [self.tile_tag.format(i + 1) for i in range(numbered)] + [self.thumbnail_tag] * thumbnail

    def validate_inputs(self, images: Any = None, text: list[str] | None = None, **kwargs: Any) -> None:
        """Refuse a text whose number of `<image>` differs from the pictures given, naming both."""
        wanted = sum(sample.count(self.image_token) for sample in text or [] if isinstance(sample, str))
        given = _count(images)
        if text is not None and wanted != given:
            raise ValueError(
                f"the text has {wanted} {self.image_token}, {given} pictures are given: allowed is the same number"
            )
        super().validate_inputs(images=images, text=text, **kwargs)

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor says that the model does not take."""
        return ["num_tiles"]

    @property
    def model_input_names(self) -> list[str]:
        """Of tokenizer and image processor."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Numbers of tokens and tiles for pictures of these (height, width), for vLLM's memory planning; no picture is made."""
        if image_sizes is None:
            return MultiModalData()
        patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        whole = self.image_processor.dynamic_resolution
        tokens = [self.image_processor.num_tokens(n) * (1 if whole else n) for n in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1 if whole else n for n in patches])

    def _check_tags(self) -> None:
        lengths = {tag: len(self.tokenizer.tokenize(tag)) for tag in self.tags(12) + self.tags(1)}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{tag} {length}" for tag, length in lengths.items())
            raise ValueError(
                f"tile tags have different lengths in tokens ({shown}): allowed are tags of one length (tile_tag=, "
                "thumbnail_tag=), or none (use_tile_tags=False, --tile-tags no)"
            )


class NemotronNanoVLV2Processor(NemotronHVLProcessor):
    """The same under the name that Nano VL's released files have."""


class NemotronH_Nano_Omni_Reasoning_V3Processor(NemotronHVLProcessor):
    """The same under the name that Nano Omni's released files have; pictures keep their resolution."""

    def __init__(self, image_processor: Any = None, *args: Any, **kwargs: Any) -> None:
        image_processor.dynamic_resolution = True
        super().__init__(image_processor, *args, **kwargs)


def _count(images: Any) -> int:
    if images is None:
        return 0
    return sum(map(_count, images)) if isinstance(images, (list, tuple)) else 1


__all__ = ["NemotronH_Nano_Omni_Reasoning_V3Processor", "NemotronHVLProcessor", "NemotronNanoVLV2Processor"]
