"""Nemotron-H with vision (NVLM-D): a vision tower's patches are shuffled, projected, and placed among the text's embeddings.

The tower is transformers' own (`internvl_vision`, `radio`, any that gives patches). Ours are the pixel shuffle (version 2 of
Megatron's), the projector and the joining. The text holds `image_token_id` once for each embedding, in the order of the images.

    b batch, l length, t tiles, r rows and c columns of patches, v width of the tower, n embeddings of all images
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoModel, InternVLVisionConfig, InternVLVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple, logging

from .arguments import one_cache
from .blocks import NemotronHRMSNorm
from .configuration_nemotron_h_vl import NemotronHNanoVLConfig, NemotronHOmniConfig, NemotronHVLConfig
from .modeling_nemotron_h import NemotronHForCausalLM, NemotronHModel, NemotronHPreTrainedModel
from .mtp import NemotronHMTP
from .names_vl import audio_names, module_names_vl, register_names_vl

logger = logging.get_logger(__name__)
LAYER_SCALE = r"layer_scale\d\.lambda1$"


def pixel_shuffle(patches: Tensor, ratio: float) -> Tensor:
    """(t, r, c, v) -> (t, r * ratio, c * ratio, v / ratio**2): squares of patches become one, pairs of a row first."""
    t, r, c, v = patches.shape
    side = round(1 / ratio)
    rows = patches.reshape(t, r, c // side, v * side).transpose(1, 2)
    return rows.reshape(t, c // side, r // side, v * side * side).transpose(1, 2)


class NemotronHInternViT(InternVLVisionModel):
    """transformers' InternViT, under a name that the rules for its released names can be given to (names_vl.py)."""

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs) -> None:
        """As transformers', in the names that its own class reads: alone, this is an ordinary InternViT."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False  # transformers would ask this file, which has experts elsewhere (see its end)


def tower_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision tower with random weights."""
    if isinstance(config, InternVLVisionConfig):
        return NemotronHInternViT._from_config(config)
    return AutoModel.from_config(config)


class NemotronHVLProjector(nn.Module):
    """norm -> Linear -> act -> Linear, without bias: the width of shuffled patches to that of the language model."""

    def __init__(self, config: NemotronHVLConfig) -> None:
        super().__init__()
        width = config.tower_width * config.merge_size**2
        norm = NemotronHRMSNorm if config.projector_norm == "rms_norm" else nn.LayerNorm
        self.layer_norm = norm(width, eps=config.projector_norm_eps)
        self.linear_1 = nn.Linear(width, config.projector_hidden_size, bias=False)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(self.layer_norm(patches))))


class NemotronHVLPreTrainedModel(NemotronHPreTrainedModel):
    """Common to both classes: names on disk, fresh weights, parts of a checkpoint that are not loaded."""

    config_class = NemotronHVLConfig
    config: NemotronHVLConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["NemotronHBlock", "InternVLVisionLayer", "RadioLayer"]
    # RADIO has no layer scale: transformers' class has one, which is 1. The indices of its summary are not weights.
    _keys_to_ignore_on_load_missing = [LAYER_SCALE, r"summary_idxs$", r"conditioner\.norm_(mean|std)$"]
    _keys_to_ignore_on_load_unexpected = [r"^sound_(encoder|projection)\."]

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        """As transformers'; the audio weights of omni are left out, with one warning."""
        files = [file for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
        if left_out := audio_names(files):
            logger.warning(
                f"{len(left_out)} audio tensors are not loaded and not saved again: {left_out[0]} ... {left_out[-1]}; "
                "transformers' own nemotron_h_omni reads them"
            )
            model.config.audio_config = None
        return NemotronHPreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As torch's, also in the names that `save_pretrained` writes: so transformers' Trainer resumes."""
        return super().load_state_dict(module_names_vl(self, state_dict), strict, assign)


class NemotronHVLModel(NemotronHVLPreTrainedModel):
    """Tower, projector and the stack of the language model."""

    def __init__(self, config: NemotronHVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = tower_of(config.vision_config)
        if config.vision_config.model_type == "radio":
            self.conditioner = self.vision_tower.make_preprocessor_external()  # the image processor normalises
        if config.has_final_norm:
            self.vision_final_layernorm = nn.LayerNorm(config.tower_width, eps=config.vision_config.layer_norm_eps)
        self.multi_modal_projector = NemotronHVLProjector(config)
        self.language_model = NemotronHModel(config.text_config)
        self.post_init()
        for name in _layer_scales(self):
            self.get_parameter(name).requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embeddings = value

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_grid_hw: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Embeddings of tiles, or of images in their own resolution.

        Args:
            pixel_values: (t, 3, side, side) tiles of all images, or (patches, 3 * patch**2) with `image_grid_hw`.
            image_grid_hw: (images, 2) rows and columns of patches of each image.

        Returns:
            `pooler_output`: one (embeddings, hidden) tensor for each tile or image; `last_hidden_state`: the tower's patches.
        """
        device = self.multi_modal_projector.linear_1.weight.device
        if device.type == "meta":  # offloaded: accelerate's hooks move what they get
            device = pixel_values.device
        pixel_values = pixel_values.to(device, self.vision_tower.dtype)
        if image_grid_hw is not None:
            patches = self._patches_of_grids(pixel_values, image_grid_hw)
        else:
            patches = self._patches_of_tiles(pixel_values)
        shuffled = [pixel_shuffle(grid, self.config.downsample_ratio).flatten(1, 2) for grid in patches]
        sizes = [(len(grid), grid.shape[1]) for grid in shuffled]
        embeds = self.multi_modal_projector(torch.cat([grid.flatten(0, 1) for grid in shuffled]))
        pooled = embeds.split([length for count, length in sizes for _ in range(count)])
        return BaseModelOutputWithPooling(last_hidden_state=patches[0], pooler_output=pooled)

    def _patches_of_tiles(self, pixel_values: Tensor) -> list[Tensor]:
        """Tiles as one grid (t, r, c, v); tokens that come before the patches (class, registers) are dropped."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: allowed is (tiles, 3, height, width)"
            )
        rows, columns = (side // self.config.patch_side for side in pixel_values.shape[-2:])
        hidden = self.vision_tower(pixel_values).last_hidden_state[:, -rows * columns :]
        return [self._final_norm(hidden).reshape(len(hidden), rows, columns, -1)]

    def _patches_of_grids(self, pixel_values: Tensor, image_grid_hw: Tensor) -> list[Tensor]:
        """Images of several sizes, each its own grid (1, r, c, v)."""
        if int(image_grid_hw.prod(-1).sum()) != len(pixel_values):
            grids = "x".join(map(str, image_grid_hw.tolist()))
            raise ValueError(f"image_grid_hw={grids} has not the {len(pixel_values)} patches of pixel_values")
        features = self._final_norm(self.vision_tower(pixel_values, image_grid_hw=image_grid_hw).features)
        grids = image_grid_hw.tolist()
        parts = features.split([rows * columns for rows, columns in grids])
        return [part.reshape(1, rows, columns, -1) for part, (rows, columns) in zip(parts, grids)]

    def _final_norm(self, patches: Tensor) -> Tensor:
        return self.vision_final_layernorm(patches) if self.config.has_final_norm else patches

    def image_positions(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(b, l) bool: where embeddings of images go. Without ids: where the embedding of the image token stands."""
        if input_ids is not None and input_ids.numel():
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def features_by_row(self, positions: Tensor, pixel_values: Tensor, image_grid_hw: Tensor | None) -> Tensor:
        """Embeddings of all images, sorted to the rows that show them: (b, most in a row, hidden), filled up with zeros.

        Raises:
            ValueError: if the text has another number of image tokens than the images have embeddings.
        """
        parts = self.get_image_features(pixel_values, image_grid_hw, return_dict=True).pooler_output
        flat, counts = torch.cat(parts), positions.sum(1).tolist()
        if sum(counts) != len(flat):
            kind = "images" if image_grid_hw is not None else "tiles"
            raise ValueError(
                f"the text has {sum(counts)} image tokens (id {self.config.image_token_id}), the {len(parts)} {kind} given "
                f"have {len(flat)} embeddings: allowed is the same number"
            )
        return nn.utils.rnn.pad_sequence(flat.split(counts), batch_first=True)

    def join(self, positions: Tensor, embeds: Tensor, features: Tensor) -> Tensor:
        """Put `features` (b, most in a row, hidden) of each row, in order, where `positions` (b, l) says.

        Raises:
            ValueError: for features of another shape than these positions ask for.
        """
        wanted = len(embeds), int(positions.sum(1).max()), embeds.shape[2]
        if features.shape != wanted:
            raise ValueError(
                f"image_features has shape {tuple(features.shape)}: allowed is {wanted}, rows of the batch, most image tokens "
                f"(id {self.config.image_token_id}) in a row, hidden_size"
            )
        if not wanted[1]:
            return embeds
        index = (positions.cumsum(1) - 1).clamp(min=0, max=features.shape[1] - 1)
        spread = features.to(embeds).gather(1, index[..., None].expand(-1, -1, features.shape[2]))
        return torch.where(positions[..., None], spread, embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        image_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """As `NemotronHModel.forward`, with images.

        Args:
            pixel_values, image_grid_hw: images as `get_image_features` takes them, in the order of the text.
            image_features: (b, most in a row, hidden) of `features_by_row`, in place of pixels.

        Raises:
            ValueError: for images that do not fit the text, and arguments that exclude each other.
        """
        check_images(pixel_values, image_grid_hw, image_features)
        kwargs["return_dict"] = True
        if pixel_values is None and image_features is None:
            if input_ids is not None and inputs_embeds is None and self._outside(input_ids):
                raise ValueError(
                    f"the text has image tokens (id {self.config.image_token_id}), 0 images are given: allowed is the same number"
                )
            return self.language_model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        positions = self.image_positions(input_ids, inputs_embeds)
        if inputs_embeds is None:
            words = input_ids.masked_fill(positions, 0)  # the image token may be past the table
            self.language_model._check_input(words, None)
            inputs_embeds = self.language_model.embeddings(words)
        if image_features is None:
            image_features = self.features_by_row(positions, pixel_values, image_grid_hw)
        return self.language_model(inputs_embeds=self.join(positions, inputs_embeds, image_features), **kwargs)

    def _outside(self, input_ids: Tensor) -> bool:
        """Whether a prompt without images has image tokens; a single token was made by `generate` and is not checked."""
        return input_ids.shape[1] > 1 and bool((input_ids == self.config.image_token_id).any())


class NemotronHVLForConditionalGeneration(NemotronHVLPreTrainedModel, NemotronHForCausalLM):
    """The vision-language model: loss, generation and multi-token prediction are the language model's."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embeddings.weight"}

    def __init__(self, config: NemotronHVLConfig) -> None:
        NemotronHPreTrainedModel.__init__(self, config)
        text = config.text_config
        self.model = NemotronHVLModel(config)
        self.vocab_size = text.vocab_size
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if text.num_nextn_predict_layers:
            self.mtp = NemotronHMTP(text)
        self.post_init()
        self._keys_to_ignore_on_save = _layer_scales(self)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, image_grid_hw: Tensor | None = None):
        """As `NemotronHVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_hw, return_dict=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        image_features: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Logits, and the next-token loss if there are labels, as `NemotronHForCausalLM.forward`; images as the base model's.

        Labels on an image, and on the text token just before one, do not count.
        `mm_token_type_ids` (b, l), 1 on images, come from processors; the ids say the same.
        """
        if kwargs.get("mtp_loss_weight"):
            raise ValueError("mtp_loss_weight: allowed is 0 in a vision-language model")
        if input_ids is not None:
            token = self.config.image_token_id
            labels = None if labels is None else mask_image_labels(labels, input_ids, token)
            if kwargs.get("shift_labels") is not None:
                kwargs["shift_labels"] = mask_image_labels(kwargs["shift_labels"], input_ids, token, shift=1)
        images = {"pixel_values": pixel_values, "image_grid_hw": image_grid_hw, "image_features": image_features}
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            one_cache(cache, past_key_values),
            inputs_embeds,
            labels,
            **{name: value for name, value in images.items() if value is not None},
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, dict]:
        """As transformers', with the images of each row made into one tensor first: seen once, however many beams follow."""
        pixels, grids = kwargs.pop("pixel_values", None), kwargs.pop("image_grid_hw", None)
        if pixels is not None:
            positions = self.model.image_positions(input_ids, kwargs.get("inputs_embeds"))
            kwargs["image_features"] = self.model.features_by_row(positions, pixels, grids)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)

    def _prefill(self, input_ids: Tensor, generation_config, model_kwargs: dict, *args, **kwargs):
        """As transformers', whose chunks ignore images: the stack runs long prompts in parts by itself."""
        if model_kwargs.get("image_features") is not None and generation_config.prefill_chunk_size is not None:
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        image_features: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """As the language model's; images go into the first pass alone, less those that the cache has seen."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if image_features is None or not (is_first_iteration or kwargs.get("use_cache") is False):
            return inputs
        length = next_sequence_length or input_ids.shape[1]
        if inputs.get("input_ids") is not None and length < input_ids.shape[1]:
            seen = (input_ids[:, :-length] == self.config.image_token_id).sum(1)
            features = [row[count:] for row, count in zip(image_features, seen.tolist())]
            image_features = nn.utils.rnn.pad_sequence(features, batch_first=True)
        return {**inputs, "image_features": image_features}


class NemotronH_Nano_VL_V2(NemotronHVLForConditionalGeneration):
    """Nemotron Nano 12B v2 VL: the same model under its released name, which readers of `architectures` look for."""

    config_class = NemotronHNanoVLConfig


class NemotronH_Nano_Omni_Reasoning_V3(NemotronHVLForConditionalGeneration):
    """Nemotron 3 Nano Omni without its audio part, under its released name."""

    config_class = NemotronHOmniConfig


def check_images(pixel_values: Tensor | None, image_grid_hw: Tensor | None, image_features: Tensor | None) -> None:
    """Raise a ValueError where one of a forward's images would be ignored."""
    if pixel_values is not None and image_features is not None:
        raise ValueError("pixel_values and image_features are both given: allowed is one of them")
    if image_grid_hw is not None and pixel_values is None:
        raise ValueError("image_grid_hw is given without pixel_values: allowed is with them alone")


def _layer_scales(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if re.search(LAYER_SCALE, name)]


def mask_image_labels(labels: Tensor, input_ids: Tensor, image_token_id: int, shift: int = 0) -> Tensor:
    """Labels (b, l) with -100 on images and on the text token just before one (Megatron's llava_model.py).
    `shift` says how many places ahead of the ids they are."""
    images = input_ids == image_token_id
    hidden = images | nn.functional.pad(images[:, 1:], (0, 1))
    return labels.masked_fill(nn.functional.pad(hidden[:, shift:], (0, shift)).to(labels.device), -100)


# transformers asks whether the words `@use_experts_implementation` stand in this file; the decorated class is in moe.py.
register_names_vl()

__all__ = [
    "NemotronH_Nano_Omni_Reasoning_V3",
    "NemotronH_Nano_VL_V2",
    "NemotronHVLForConditionalGeneration",
    "NemotronHVLModel",
    "NemotronHVLPreTrainedModel",
]
