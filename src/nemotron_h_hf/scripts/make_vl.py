"""Join a language model and a vision tower under a fresh projector: a vision-language model to be trained.

    nemotron-h make-vl --language-model path/or/id --vision-model path/or/id new-model/
    nemotron-h make-vl --language-model ... --vision-model preset:internvit-300m new-model/      # a fresh tower of that shape
    nemotron-h make-vl ... --image-size 512 --max-tiles 6 --tile-tags no new-model/

The tower is any that transformers' AutoModel knows (`internvl_vision`, `radio`, ...). The tokenizer gets a token <image>, and the
embeddings a row for it if there is no spare one. Next: `nemotron-h sft --train projector`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf import (
    NemotronHForCausalLM,
    NemotronHVLConfig,
    NemotronHVLForConditionalGeneration,
    NemotronHVLProcessor,
)
from nemotron_h_hf.command_line import argument, option, read_options
from nemotron_h_hf.inputs import load_tokenizer
from nemotron_h_hf.model.image_processing_nemotron_h_vl import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from nemotron_h_hf.model.saving import saving
from nemotron_h_hf.output_folders import is_made, note_made, stamps, writing
from nemotron_h_hf.tokenizer_files import save_tokenizer
from nemotron_h_hf.units import human_count

# Shapes of fresh towers, with the size of tile that they were made for.
TOWERS: dict[str, dict[str, Any]] = {
    "internvit-300m": {"model_type": "internvl_vision", "attention_bias": True, "use_mean_pooling": True},
    "radio-h": {"model_type": "radio"},
}
PRESET = "preset:"


@dataclass(frozen=True)
class MakeArguments:
    """What the command line says."""

    language_model: str = option(None, "checkpoint folder or hub id of a Nemotron-H", required=True)
    vision_model: str = option(
        None, f"folder or hub id of a tower, or {', '.join(PRESET + name for name in TOWERS)} for a fresh one",
        required=True,
    )  # fmt: skip
    output: Path = argument("new folder", metavar="OUT")
    image_size: int | None = option(None, "side of a tile in pixels (what the tower was made for)")
    max_tiles: int = option(12, "of one picture, without the thumbnail (12)")
    tile_tags: str = option("yes", "a tag before each tile (yes)", choices=("yes", "no"))
    thumbnail: str = option("yes", "the whole picture after its tiles (yes)", choices=("yes", "no"))
    projector_hidden_size: int | None = option(None, "(the widest MLP of the language model)")
    projector_act: str = option("relu2", "(relu2, as in the paper)")
    projector_norm: str = option("rms_norm", "(rms_norm)", choices=("rms_norm", "layer_norm"))
    seed: int = option(0, "of the fresh weights (0)")


def main(argv: Sequence[str] | None = None) -> int:
    """Join, save, say what there is."""
    arguments = parse(argv)
    disable_progress_bar()
    set_seed(arguments.seed)
    with writing(arguments.output, arguments.language_model, arguments.vision_model) as target:
        sources = [stamps(arguments.language_model), stamps(arguments.vision_model)]
        made_from = {"command": "make-vl", "sources": sources, **vars(arguments), "output": None}
        if is_made(target, made_from):
            print(f"{target} is already there and whole")
            return 0
        language, tokenizer = load_language_model(arguments.language_model)
        tower = load_tower(arguments.vision_model)
        token = image_token(language, tokenizer)
        model = join(language, tower, token, arguments)
        processor = NemotronHVLProcessor.of_model(model.config, tokenizer)
        with saving(target) as staging:
            model.save_pretrained(staging)
            processor.save_pretrained(staging)
            save_tokenizer(tokenizer, staging)
            note_made(staging, made_from)
    print(describe(model))
    return 0


def parse(argv: Sequence[str] | None) -> MakeArguments:
    """Read the command line."""
    return read_options(MakeArguments, argv, "make-vl", __doc__)


def load_language_model(name: str) -> tuple[NemotronHForCausalLM, PreTrainedTokenizerBase]:
    """The language model in its own precision, and its tokenizer."""
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "nemotron_h":
        raise ValueError(f"--language-model {name!r} is a {config.model_type}: allowed is a nemotron_h")
    return AutoModelForCausalLM.from_pretrained(name), load_tokenizer(name)


def load_tower(name: str) -> nn.Module:
    """A vision tower: trained, from files; or fresh, of a preset's shape.

    Raises:
        ValueError: for a model without a vision tower's configuration.
    """
    if name.startswith(PRESET):
        fields = TOWERS.get(name.removeprefix(PRESET))
        if fields is None:
            raise ValueError(f"--vision-model {name!r}: allowed presets are {', '.join(TOWERS)}")
        return AutoModel.from_config(AutoConfig.for_model(**fields))
    config = AutoConfig.from_pretrained(name)
    kinds = ("hidden_size", "patch_size", "num_hidden_layers")
    if missing := [kind for kind in kinds if kind not in config.to_dict()]:
        raise ValueError(
            f"--vision-model {name!r} is a {config.model_type} without {missing[0]}: allowed is a vision tower"
        )
    return AutoModel.from_pretrained(name)


def image_token(language: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of <image>, which the tokenizer gets if it has none; the language model grows if it has no row for it."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    token = tokenizer.convert_tokens_to_ids("<image>")
    if token >= language.config.vocab_size:
        count = language.config.vocab_size
        language.resize_token_embeddings(token + 1, mean_resizing=False)
        for part in (language.get_input_embeddings(), language.get_output_embeddings()):
            weight = part.weight.data  # the mean: a head's random row could be likelier than every word
            weight[count:] = weight[:count].mean(0, dtype=torch.float32).to(weight.dtype)
    return token


def join(
    language: NemotronHForCausalLM, tower: nn.Module, token: int, arguments: MakeArguments
) -> NemotronHVLForConditionalGeneration:
    """One model of both, in the language model's precision, with a fresh projector between them."""
    text, vision = language.config, tower.config
    side = arguments.image_size or (vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0])
    widths = text.mlp_widths or (text.moe_shared_expert_intermediate_size,)
    config = NemotronHVLConfig(
        text_config=text, vision_config=vision, image_token_id=token, image_size=side, max_tiles=arguments.max_tiles,
        use_tile_tags=arguments.tile_tags == "yes", use_thumbnail=arguments.thumbnail == "yes",
        projector_hidden_size=arguments.projector_hidden_size or max(widths), projector_hidden_act=arguments.projector_act,
        projector_norm=arguments.projector_norm,
        image_mean=CLIP_MEAN if vision.model_type == "radio" else IMAGENET_MEAN,
        image_std=CLIP_STD if vision.model_type == "radio" else IMAGENET_STD,
    )  # fmt: skip
    model = NemotronHVLForConditionalGeneration(config).to(language.dtype)
    conditioner = {name: value for name, value in tower.state_dict().items() if name.startswith("input_conditioner.")}
    rest = {name: value for name, value in tower.state_dict().items() if name not in conditioner}
    model.model.vision_tower.load_state_dict(rest)
    if conditioner:
        model.model.conditioner.load_state_dict({name.split(".")[1]: value for name, value in conditioner.items()})
    model.model.language_model.load_state_dict(language.model.state_dict(), assign=True)
    model.lm_head.load_state_dict(language.lm_head.state_dict(), assign=True)
    if text.num_nextn_predict_layers:
        model.mtp.load_state_dict(language.mtp.state_dict(), assign=True)
    model.generation_config = language.generation_config
    return model.eval()


def describe(model: NemotronHVLForConditionalGeneration) -> str:
    """Sizes of the parts, one line each."""
    config, stack = model.config, model.model
    parts = {
        f"tower      {config.vision_config.model_type}": stack.vision_tower,
        "projector  fresh": stack.multi_modal_projector,
        f"language   {config.text_config.hybrid_override_pattern}": stack.language_model,
    }
    lines = [
        f"{name}: {human_count(sum(weight.numel() for weight in part.parameters()))}" for name, part in parts.items()
    ]
    return "\n".join([*lines, f"{config.image_seq_length} embeddings per tile of {config.image_size} pixels"])


if __name__ == "__main__":
    sys.exit(main())
