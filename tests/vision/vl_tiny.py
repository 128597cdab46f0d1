"""Tiny vision-language models of every kind, with weights spread (tiny.py) to make mistakes show, and what their tests share."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from nemotron_h_hf import (
    NemotronH_Nano_Omni_Reasoning_V3,
    NemotronH_Nano_VL_V2,
    NemotronHVLConfig,
    NemotronHVLForConditionalGeneration,
    NemotronHVLImageProcessor,
    NemotronHVLProcessor,
)

IMAGE = 60  # the image token
TEXT = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8,
    "max_position_embeddings": 4096, "hybrid_override_pattern": "M-M*-M-", "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "hybrid_override_pattern": "MEM*EM", "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 2.5,
}  # fmt: skip
INTERNVIT = {
    "model_type": "internvl_vision", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "image_size": 28, "patch_size": 7,
}  # fmt: skip
RADIO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 64}
SIDE = 28  # of a tile of the InternViT model: 4 x 4 patches, 4 embeddings


def vl_model(seed: int = 0, text: dict | None = None, **fields) -> NemotronHVLForConditionalGeneration:
    """NVLM-D: InternViT and tiles."""
    given = {
        "image_token_id": IMAGE,
        "image_size": SIDE,
        "projector_hidden_size": 40,
        "vision_config": INTERNVIT,
        **fields,
    }
    config = NemotronHVLConfig(text_config={**TEXT, **(text or {})}, **given)
    return spread(NemotronHVLForConditionalGeneration(config), seed)


def nano_vl_fields() -> dict:
    """config.json of Nano 12B v2 VL, as released, in a small size."""
    return {
        "model_type": "NemotronH_Nano_VL_V2", "architectures": ["NemotronH_Nano_VL_V2"], "force_image_size": 32,
        "downsample_ratio": 0.5, "ps_version": "v2", "use_thumbnail": True, "template": "nemotron", "vit_hidden_size": 32,
        "norm_mean": [0.48, 0.45, 0.4], "norm_std": [0.27, 0.26, 0.28], "projector_hidden_size": 40,
        "img_context_token_id": IMAGE, "img_context_token": "<image>", "img_start_token": "<img>", "img_end_token": "</img>",
        "llm_config": {"model_type": "nemotron_h", **TEXT},
        "vision_config": {"version": "radio_v2.5-h", "args": {"model": "vit_huge_patch16_224"}, **RADIO},
    }  # fmt: skip


def omni_fields(**text) -> dict:
    """config.json of Nano Omni without audio, in transformers' spelling and a small size."""
    return {
        "image_token_id": IMAGE, "projector_hidden_size": 40, "vision_hidden_size": 32, "downsample_ratio": 0.5,
        "text_config": {"model_type": "nemotron_h", **TEXT, **EXPERTS, **text},
        "vision_config": {"model_type": "radio", "video_temporal_patch_size": 2, **RADIO},
    }  # fmt: skip


RELEASED = {"nano": (NemotronH_Nano_VL_V2, nano_vl_fields), "omni": (NemotronH_Nano_Omni_Reasoning_V3, omni_fields)}


def released_model(kind: str, seed: int = 0, **fields) -> NemotronHVLForConditionalGeneration:
    """A model of a released family."""
    model_class, read = RELEASED[kind]
    fields = {**read(), **fields}
    fields.pop("model_type", None)
    return spread(model_class(model_class.config_class(**fields)), seed)


@torch.no_grad()
def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Values that matter for every parameter: norms off one, biases off zero, step sizes from small to large."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "layer_scale" in name:
            continue
        if name.endswith("A_log"):
            weight.copy_((noise.abs() * 4 + 1).log())
        elif name.endswith("dt_bias"):
            weight.copy_(noise * 2 - 2)
        elif weight.dim() < 2:
            weight.copy_(noise * 0.2 + ("bias" not in name))
        else:
            weight.copy_(noise / weight[0].numel() ** 0.5 * (1 if "embed" not in name else weight[0].numel() ** 0.5))
    return model.eval()


def prompt(*rows: list, width: int | None = None, left: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Rows of token counts and images ("3" tiles as a string) to padded ids and a mask: [5, "2", 4] is text, 2 tiles, text."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for row in rows:
        line = []
        for part in row:
            if isinstance(part, str):
                line += [IMAGE] * 4 * int(part)
            else:
                line += torch.randint(3, 50, (part,), generator=generator).tolist()
        lines.append(line)
    width = width or max(map(len, lines))
    pads = [[0] * (width - len(line)) for line in lines]
    ids = [pad + line if left else line + pad for pad, line in zip(pads, lines)]
    real = [
        [0] * len(pad) + [1] * len(line) if left else [1] * len(line) + [0] * len(pad) for pad, line in zip(pads, lines)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}


def tiles(count: int, seed: int = 1, side: int = SIDE) -> Tensor:
    """Pixels of tiles."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def word_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """Every word and sign one token; each tile tag has six, as with Nemotron's own tokenizer."""
    signs = [
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
        "<image>",
        *more,
        *"<>/_?.,:\n ",
        *"0123456789",
        "global_",
        "thumbnail",
        "tile",
    ]
    words = [*signs, "Image", "img", "what", "is", "this", "user", "assistant", "a", "cat", "two", "pictures"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"global_|thumbnail|tile|_|[A-Za-z]+|\d|."), "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, extra_special_tokens=["<image>", *more], **special)


def vl_processor(**fields) -> NemotronHVLProcessor:
    """Tiles of SIDE pixels with tags that are equally long in `word_tokenizer`."""
    images = {"image_size": SIDE, "patch_size": 7, **fields.pop("images", {})}
    given = dict(fields)
    tokenizer = given.pop("tokenizer", None) or word_tokenizer()
    return NemotronHVLProcessor(NemotronHVLImageProcessor(**images), tokenizer, **given)
