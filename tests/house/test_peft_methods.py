"""Every method of the installed PEFT on our model and on transformers' own: train, save, load, merge; counted for both.

`make test-slow`. A method passes where its loss falls in eight steps, a saved adapter computes the same after loading, and
merging changes no logit, or is one of UNMERGED. METHODS names every method of the pinned PEFT; a new one is a failure here
until it has a row.
"""

import copy

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import native_twin, prompt, tiny_model
from torch import nn

from nemotron_h_hf import NemotronHModel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LINEARS = ["in_proj", "q_proj", "v_proj", "up_proj", "down_proj"]
LAYERS = {"target_modules": LINEARS}
TOKENS = {"num_virtual_tokens": 4}

# Method -> its settings on a model of width 48.
METHODS = {
    "LORA": {"r": 4, **LAYERS},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 2, "tfinal": 2, **LAYERS},
    "ADAMSS": {"r": 4, "num_subspaces": 2, **LAYERS},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": {"target_modules": ["up_proj"]},
    "BOFT": {"boft_block_size": 4, "target_modules": ["q_proj", "v_proj"]},
    "C3A": {"block_size": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "CARTRIDGE": {**TOKENS},
    "CPT": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "DEFT": {**LAYERS},
    "DELORA": {"r": 4, **LAYERS},
    "FOURIERFT": {"n_frequency": 50, **LAYERS},
    "FROD": {**LAYERS},
    "GLORA": {"r": 4, **LAYERS},
    "GRALORA": {"r": 4, "gralora_k": 2, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "HIRA": {"r": 4, **LAYERS},
    "HRA": {"r": 4, **LAYERS},
    "IA3": {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": {"r": 4, **LAYERS},
    "LN_TUNING": {"target_modules": ["norm"]},
    "LOHA": {"r": 4, **LAYERS},
    "LOKR": {"r": 4, **LAYERS},
    "MISS": {"r": 4, **LAYERS},
    "OFT": {"oft_block_size": 4, "r": 0, "target_modules": ["q_proj", "v_proj"]},
    "SHIRA": {"r": 2, **LAYERS},
    "PROMPT_TUNING": TOKENS,
    "MULTITASK_PROMPT_TUNING": {**TOKENS, "num_tasks": 2},
    "OSF": {**LAYERS},
    "P_TUNING": {**TOKENS, "encoder_hidden_size": 16},
    "PEANUT": {"r": 4, **LAYERS},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 1, **LAYERS},
    "PREFIX_TUNING": TOKENS,
    "PSOFT": {"r": 4, **LAYERS},
    "PVERA": {"r": 4, **LAYERS},
    "RANDLORA": {"r": 4, **LAYERS},
    "ROAD": {"group_size": 4, **LAYERS},
    "SHADOW": {},  # a second, smaller model from a folder: see config_of
    "SUPERTUNING": {**LAYERS},
    "TINYLORA": {"r": 2, **LAYERS},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7, 8, 9, 10], "target_modules": ["embeddings"]},
    "UNILORA": {"r": 4, **LAYERS},
    "VBLORA": {
        "r": 4,
        "num_vectors": 30,
        "vector_length": 8,
        "topk": 2,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    },
    "VERA": {"r": 4, **LAYERS},
    "WAVEFT": {"n_frequency": 50, **LAYERS},
    "XLORA": {"hidden_size": 48, "xlora_depth": 1},  # over two trained adapters: see config_of
}
# Method -> why PEFT 0.21.2 cannot, on our class and on transformers' own alike: the words of its error.
REFUSED = {
    "ADAPTION_PROMPT": "Unsupported model type for adaption prompt",  # a list of four families
    "CARTRIDGE": "linear|attention",  # a prefix of keys and values, which Mamba layers have not
    "PREFIX_TUNING": "linear|attention",
}
# Methods whose merge PEFT does not have, or refuses.
UNMERGED: set[str] = set()
# Routed experts are parameters of three axes, which only LoRA's target_parameters reaches.
EXPERTS = {"target_parameters": ["experts.up_proj", "experts.down_proj"]}
ON_EXPERTS = ("LORA", "ADALORA", "DELORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "ROAD", "P_TUNING", "TRAINABLE_TOKENS")
WITH_TASK = {"task_ids": torch.zeros(2, dtype=torch.long)}
EXTRA = {"POLY": WITH_TASK, "MULTITASK_PROMPT_TUNING": WITH_TASK}


def config_of(method: str, plain: nn.Module, folder) -> peft.PeftConfig:
    kind = next(kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value == method)
    settings = copy.deepcopy(METHODS[method])
    if method == "XLORA":
        settings["adapters"] = {}
        for seed in (0, 1):
            lora = peft.get_peft_model(copy.deepcopy(plain), config_of("LORA", plain, folder))
            falls(lora, "LORA", seed)
            lora.save_pretrained(folder / f"lora{seed}")
            settings["adapters"][str(seed)] = str(folder / f"lora{seed}")
    if method == "SHADOW":
        tiny_model(model_class=NemotronHModel, hybrid_override_pattern="M-").save_pretrained(folder / "shadow")
        settings["shadow_model"] = str(folder / "shadow")
    return kind(task_type="CAUSAL_LM", **settings)


def falls(model: nn.Module, method: str, seed: int = 0) -> None:
    """Eight steps of training, in which the loss falls."""
    ids = prompt(2, 16, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained, "nothing to train"
    optimizer, losses = torch.optim.Adam(trained, lr=2e-2), []
    model.train()
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), **EXTRA.get(method, {})).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-2:]) < losses[0] - 1e-4, f"the loss does not fall: {losses}"
    model.eval()


@torch.no_grad()
def logits(model: nn.Module, method: str) -> torch.Tensor:
    ids = prompt(2, 16)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **EXTRA.get(method, {})).logits


def tried(method: str, plain: nn.Module, folder, **settings) -> tuple[float, float | None]:
    """Train, save, load and merge: the greatest relative difference from loading, and from merging (None: there is none)."""
    torch.manual_seed(0)
    config = config_of(method, plain, folder)
    for name, value in settings.items():
        setattr(config, name, value)
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    falls(model, method)
    wanted = logits(model, method)
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    apart = ((logits(loaded, method) - wanted).abs().max() / wanted.abs().max()).item()
    try:
        merged = model.merge_and_unload()
    except (NotImplementedError, AttributeError, ValueError, TypeError) as e:
        print("NOMERGE", method, type(e).__name__, str(e)[:150])
        return apart, None
    return apart, ((logits(merged, "LORA") - wanted).abs().max() / wanted.abs().max()).item()
