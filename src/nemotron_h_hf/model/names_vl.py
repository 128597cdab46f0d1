"""Names of a vision-language checkpoint on disk, as transformers' loader and saver are told them.

All checkpoints have one layout, the released one; what follows `vision_model.` are the names of the tower's first release:

    vision_model.radio_model.*      model.vision_tower.*      transformers renames RADIO's insides by its own rules
    vision_model.{embeddings,encoder}.*                       InternViT's, by the rules below
    mlp1.{0,1,3}.*                  model.multi_modal_projector.{layer_norm,linear_1,linear_2}.*
    language_model.backbone.*       model.language_model.*    experts by the rules of loading.py
    language_model.lm_head.*        lm_head.*
    mtp.*                           mtp.*
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, WeightTransform

from .loading import OldName, expert_rules
from .weights import read_header

OWN, RELEASED = "nemotron_h_vl", ("NemotronH_Nano_VL_V2", "NemotronH_Nano_Omni_Reasoning_V3")
FIRST_PARTS = ("vision_model.", "mlp1.", "language_model.")
AUDIO = re.compile(r"sound_(encoder|projection)\.")

# on disk -> in the model; longer rules follow those that they extend, and are undone first
NAMES = {
    "vision_model.": "model.vision_tower.",
    "model.vision_tower.radio_model.input_conditioner.": "model.conditioner.",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
    "vision_projector.vision_final_layernorm.": "model.vision_final_layernorm.",
    "language_model.backbone.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
INTERNVIT_TOWER = "NemotronHInternViT"  # the class whose names these are
INTERNVIT = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "embeddings.position_embedding": "embeddings.position_embeddings",
}
INTERNVIT_LAYER = {
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "attn.qkv": "attn.qkv",
    "mlp": "mlp",
}


def register_names_vl() -> None:
    """Teach transformers to read and write these names."""
    register_checkpoint_conversion_mapping(INTERNVIT_TOWER, internvit_rules(), overwrite=True)
    for model_type in (OWN, *RELEASED):
        register_checkpoint_conversion_mapping(model_type, rules(), overwrite=True)


def rules() -> list[WeightTransform]:
    """From names on disk to names in the model."""
    return [
        *(WeightRenaming("^" + re.escape(stored), name) for stored, name in NAMES.items()),
        OldName("language_model.mtp.", "mtp."),
        OldName("model.language_model.embedding.weight", "model.language_model.embeddings.weight"),
        *expert_rules(),
    ]


def internvit_rules() -> list[WeightTransform]:
    """InternViT's own, inside the tower and after `rules`. Other towers have names that look like these (CLIP's)."""
    layers = r"^encoder\.layers\.(\d+)\."
    return [
        *(WeightRenaming("^" + re.escape(stored), name) for stored, name in INTERNVIT.items()),
        *(
            WeightRenaming(layers + re.escape(stored), rf"encoder.layer.\1.{name}")
            for stored, name in INTERNVIT_LAYER.items()
        ),
        *(
            WeightConverter(f"attn.qkv.{kind}", [f"attention.{x}_proj.{kind}" for x in "qkv"], [Chunk(dim=0)])
            for kind in ("weight", "bias")
        ),
    ]


def module_names_vl(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict in names on disk under the names of the modules, by the rules that `from_pretrained` goes by."""
    if not any(name.startswith(FIRST_PARTS) for name in state_dict):
        return state_dict
    every = get_model_conversion_mapping(model, add_legacy=False)
    converters = [rule for rule in every if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in every if isinstance(rule, WeightRenaming)]
    found: dict[str, Tensor] = {}
    pending: dict[str, WeightConverter] = {}
    for stored, tensor in sorted(state_dict.items(), key=lambda entry: _natural(entry[0])):
        name = stored
        for rule in renamings:
            name, _ = rule.rename_source_key(name)
        for rule in converters:
            target, pattern = rule.rename_source_key(name)
            if pattern is not None:
                pending.setdefault(target, deepcopy(rule)).add_tensor(target, stored, pattern, tensor)
                break
        else:
            found[name] = tensor
    for target, converter in pending.items():
        made = converter.convert(target, model=model, config=model.config)
        found |= {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
    return found


def audio_names(files: Iterable[str]) -> list[str]:
    """The tensors of omni's audio part in safetensors files, sorted."""
    return sorted(name for file in files for name in read_header(file) if AUDIO.match(name))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts experts by number."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
