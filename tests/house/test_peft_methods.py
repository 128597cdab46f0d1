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
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHModel as NativeModel

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
# Methods without a merge in PEFT: tokens in front of the prompt, or a change that depends on the input.
UNMERGED = {"CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PROMPT_TUNING", "P_TUNING", "SHADOW"}
# A mixture by the input too; PEFT 0.21.2's merge of it gives other logits, and loading draws its classifier anew, on both classes.
MIXTURE = "XLORA"
WITH_EXPERTS = (
    "LORA", "ADALORA", "DELORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "ROAD", "RANDLORA", "P_TUNING", "TRAINABLE_TOKENS", "SHADOW",
)  # fmt: skip
# Of the greatest logit. Most lie below 2e-6. RANDLORA's rate here makes projections of 200, so log decays of thousands; ours
# takes differences of their running sums, as mamba_ssm's kernels do, and rounds 3e-5 (transformers' plain path 3e-6).
NEAR = 5e-5
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


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def check(method: str, plain: nn.Module, folder) -> None:
    """Train, save, load and merge, as far as PEFT has it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(plain), config_of(method, plain, folder))
    falls(model, method)
    wanted = logits(model, method)
    model.save_pretrained(folder)
    loaded = logits(peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval(), method)
    if method == MIXTURE:
        assert apart(loaded, wanted) > 1e-3, "PEFT loads the classifier now: compare it"
        return
    assert apart(loaded, wanted) < 1e-6
    if method in UNMERGED:
        with pytest.raises((NotImplementedError, AttributeError)):
            model.merge_and_unload()
    else:
        assert apart(logits(model.merge_and_unload(), method), wanted) < NEAR


def test_every_method_of_this_peft_has_a_row():
    assert set(METHODS) == {method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert len(set(METHODS) - set(REFUSED) - UNMERGED - {MIXTURE}) == 34  # train, save, load and merge


@pytest.mark.parametrize("native", [False, True], ids=["ours", "native"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_on_ours_and_on_transformers_own(method, native, tmp_path):
    model = tiny_model(mlp_bias=method == "BEFT", use_cache=method != MIXTURE)  # what these two ask for
    model = native_twin(model) if native else model
    if method in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method]):
            check(method, model, tmp_path)
    else:
        check(method, model, tmp_path)


@pytest.mark.parametrize("native", [False, True], ids=["ours", "native"])
@pytest.mark.parametrize("method", WITH_EXPERTS)
def test_methods_on_a_model_with_experts(method, native, tmp_path):
    model = tiny_model("moe")
    check(method, native_twin(model) if native else model, tmp_path)


def test_a_shadow_of_fewer_layers_comes_from_a_folder():
    """SHADOW's default writes num_hidden_layers=1: of a pattern that names no layers. transformers ignores it and makes all seven."""
    native = peft.get_peft_model(native_twin(tiny_model()), peft.ShadowConfig(task_type="CAUSAL_LM"))
    assert [len(m.layers) for m in native.modules() if isinstance(m, NativeModel)] == [7, 7]
    with pytest.raises(ValueError, match="num_hidden_layers=1 does not match"):
        peft.get_peft_model(tiny_model(), peft.ShadowConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("native", [False, True], ids=["ours", "native"])
def test_lora_on_routed_experts(native, tmp_path):
    """Their weights are parameters of three axes, which LoRA's target_parameters reaches."""
    model = tiny_model("moe")
    model = native_twin(model) if native else model
    parameters = ["experts.up_proj", "experts.down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[], target_parameters=parameters)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    falls(adapted, "LORA")
    wanted = logits(adapted, "LORA")
    assert apart(logits(model, "LORA"), wanted) > 0.01
    adapted.save_pretrained(tmp_path)
    assert apart(logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval(), "LORA"), wanted) < 1e-6
    assert apart(logits(adapted.merge_and_unload(), "LORA"), wanted) < NEAR
