"""LoRA on every projection, out_proj included: gradients, saving, loading, merging; and who is still refused."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import native_twin, prompt, tiny_model
from torch import nn

from nemotron_h_hf import NemotronHForCausalLM, NemotronHForSequenceClassification
from nemotron_h_hf.model import peft_support

PROJECTIONS = ["in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def with_adapters(model: nn.Module, targets=PROJECTIONS, **kwargs) -> PeftModel:
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **kwargs)
    )


def train_one_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give both halves of each adapter a value and a gradient; the gradients by name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.train()
    ids = prompt(2, 21)
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def adapted_modules(model: nn.Module) -> set[str]:
    return {name.split(".mixer.")[1].split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("shape", ["dense", "moe", "latent"])
@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear"], ids=["by name", "all-linear"])
def test_every_adapter_learns_saves_loads_and_merges(shape, targets, tmp_path):
    torch.manual_seed(0)  # of the adapters
    plain = tiny_model(shape)
    before = plain(prompt()).logits
    model = with_adapters(copy.deepcopy(plain), targets)
    num_mamba = plain.config.hybrid_override_pattern.count("M")
    assert sum("out_proj.lora_A" in name for name, _ in model.named_parameters()) == num_mamba
    wanted = {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert wanted < adapted_modules(model) and any("up_proj" in name for name in adapted_modules(model))

    gradients = train_one_step(model)
    idle = [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0]
    assert gradients and not idle

    adapted = model(prompt()).logits
    assert (adapted - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(loaded(prompt()).logits, adapted, rtol=0, atol=0)
    ours = copy.deepcopy(plain)
    ours.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(ours(prompt()).logits, adapted, rtol=0, atol=0)

    merged = model.merge_and_unload()
    assert type(merged) is NemotronHForCausalLM
    torch.testing.assert_close(merged(prompt()).logits, adapted, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = NemotronHForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(prompt()).logits, merged(prompt()).logits, rtol=0, atol=0)


def test_out_proj_alone_is_really_used_in_training_and_decoding():
    model = with_adapters(tiny_model(), ["out_proj"])
    assert adapted_modules(model) == {"out_proj"}
    gradients = train_one_step(model)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    ids = prompt(1, 12)
    full = model(ids).logits
    cache = model(ids[:, :7]).past_key_values
    steps = []
    for token in range(7, 12):
        output = model(ids[:, token : token + 1], past_key_values=cache)
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full[:, 7:], rtol=0, atol=1e-5)


def test_adapters_on_expert_weights(tmp_path):
    """The routed experts are parameters, not Linear layers; PEFT reaches them by `target_parameters`."""
    plain = tiny_model("moe")
    config = LoraConfig(r=2, target_modules=["out_proj"], target_parameters=["experts.up_proj", "experts.down_proj"])
    model = get_peft_model(copy.deepcopy(plain), config)
    assert all(gradient.abs().sum() > 0 for gradient in train_one_step(model).values())
    adapted = model(prompt()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(prompt()).logits, adapted, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(prompt()).logits, adapted, rtol=0, atol=1e-5)


def test_transformers_own_class_is_still_refused():
    ours, native = tiny_model(), native_twin(tiny_model())
    with_adapters(ours, ["out_proj"])
    for targets in (["out_proj"], "all-linear"):
        with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
            with_adapters(copy.deepcopy(native), targets)


def test_conv1d_is_still_refused():
    """Its weight is read by the mixer, so an adapter on it would be passed by."""
    with pytest.raises(ValueError, match="'conv1d' is incompatible"):
        with_adapters(tiny_model(), ["conv1d"])


def test_adapters_on_a_classifier():
    model = tiny_model("dense", model_class=NemotronHForSequenceClassification, num_labels=3)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model, config)
    assert "out_proj" in adapted_modules(model)
    ids = prompt(2, 9)
    model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


def test_multi_token_prediction_layers_can_be_left_out(monkeypatch):
    mtp, warnings = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}, []
    monkeypatch.setattr(peft_support.logger, "warning_once", warnings.append)
    with_adapters(tiny_model("moe", **mtp))
    assert warnings and r"exclude_modules=r'mtp\..*'" in warnings[0]
    warnings.clear()
    model = with_adapters(tiny_model("moe", **mtp), exclude_modules=r"mtp\..*")
    assert not warnings
    assert not any("mtp" in name for name, _ in model.named_parameters() if "lora" in name)
    assert all(gradient.abs().sum() > 0 for gradient in train_one_step(model).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["import peft, nemotron_h_hf", "import sys, nemotron_h_hf; assert 'peft' not in sys.modules; import peft"],
    ids=["peft first", "peft last"],
)
def test_order_of_imports_does_not_matter(imports):
    code = f"""
{imports}
from tiny import tiny_model
model = tiny_model()
peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["out_proj"]))
print(sum("lora_A" in name for name, _ in model.named_parameters()))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
