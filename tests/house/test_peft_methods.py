"""Every method of the installed PEFT on our model and on transformers' own: train, save, load, merge; counted for both.

`make test-slow`. A method passes where its loss falls in eight steps, a saved adapter computes the same after loading, and
merging (where the method has it) changes no logit. METHODS names every method of the pinned PEFT; a new one is a failure here
until it has a row.
"""

import copy

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import native_twin, prompt, tiny_model
from torch import nn

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
    "BEFT": {"target_modules": ["q_proj"]},
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
    "SHADOW": {},
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
    "XLORA": {},
}
# Method -> why PEFT 0.21.2 itself cannot, on our class and on transformers' own alike: the words of its error.
REFUSED = {
    "ADAPTION_PROMPT": "Unsupported model type for adaption prompt",  # a list of four families
    "BEFT": "Base layer has no bias",  # released models have none
    "CARTRIDGE": "linear|attention",  # a prefix of keys and values, which Mamba layers have not
    "PREFIX_TUNING": "linear|attention",
    "XLORA": "use_cache|adapters",  # a mixture of adapters that are trained already
}
# PEFT makes a second model of one layer by writing num_hidden_layers, which our configuration checks against its pattern.
NATIVE_ALONE = {"SHADOW": "num_hidden_layers=1 does not match"}
WITH_TASK = {"task_ids": torch.zeros(2, dtype=torch.long)}
EXTRA = {"POLY": WITH_TASK, "MULTITASK_PROMPT_TUNING": WITH_TASK}


def config_of(method: str) -> peft.PeftConfig:
    kind = next(kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value == method)
    return kind(task_type="CAUSAL_LM", **copy.deepcopy(METHODS[method]))


def tried(method: str, plain: nn.Module, folder) -> float:
    """Train, save, load and merge; the greatest difference that loading or merging made. Raises where the method fails."""
    torch.manual_seed(0)
    ids = prompt(2, 16)
    extra = EXTRA.get(method, {})
    model = peft.get_peft_model(copy.deepcopy(plain), config_of(method))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained, "nothing to train"
    optimizer, losses = torch.optim.Adam(trained, lr=2e-2), []
    model.train()
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), **extra).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-2:]) < losses[0] - 1e-4, f"the loss does not fall: {losses}"
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
        worst = (loaded(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits - wanted).abs().max().item()
        if not isinstance(model.base_model, nn.Module) or not callable(
            getattr(model.base_model, "merge_and_unload", None)
        ):
            return worst
        try:
            merged = model.merge_and_unload()
        except (NotImplementedError, AttributeError):
            return worst  # a method that cannot be merged
        return max(worst, (merged(input_ids=ids).logits - wanted).abs().max().item())


def test_every_method_of_this_peft_has_a_row():
    assert set(METHODS) == {method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_ours_and_on_transformers_own(method, tmp_path):
    plain = tiny_model()
    for name, model in (("ours", plain), ("native", native_twin(plain))):
        refused = {**REFUSED, **(NATIVE_ALONE if name == "ours" else {})}
        if method in refused:
            with pytest.raises(ValueError, match=refused[method]):
                tried(method, model, tmp_path / name)
        else:
            assert tried(method, model, tmp_path / name) < 5e-4, name
