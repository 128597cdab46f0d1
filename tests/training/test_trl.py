"""TRL's trainers and PEFT on our model as they are: SFT with packing and padding-free, DPO, GRPO, some steps each."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from nemotron_h_hf import NemotronHForCausalLM

VOCAB = 2048
PROJECTIONS = ["in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
TEXTS = [f"def f{i}(x):\n    return {'x + ' * (i % 5)}{i}\n" for i in range(12)]


def model_of(shape="dense", **config):
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return tiny_model(shape, vocab_size=VOCAB, **ids, **config)


def settings(tmp_path, **fields):
    return {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 2,
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3,
        **fields,
    }  # fmt: skip


def lora():
    return LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")


def changed(model, before) -> set[str]:
    """Names of parameters that training moved."""
    return {
        name for name, weight in model.named_parameters() if name in before and not torch.equal(weight, before[name])
    }


def copy_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def loss_alone(model, documents, num_items):
    """The summed next-token loss of documents, each on its own, over a number of items."""
    total = 0.0
    for ids in documents:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    return total / num_items


@pytest.mark.parametrize("how", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}, {}])
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_sft_loss_is_that_of_the_documents_alone(how, shape, tmp_path, tokenizer):
    model = model_of(shape)
    dataset = Dataset.from_dict({"text": TEXTS})
    args = SFTConfig(**settings(tmp_path, max_steps=1, per_device_train_batch_size=12, **how))
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    documents = [[*ids, *([] if ids[-1] == 0 else [0])] for ids in tokenizer(TEXTS)["input_ids"]]
    expected = loss_alone(model.eval(), documents, sum(len(ids) - 1 for ids in documents))
    before = copy_of(model)
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected, abs=2e-4)]
    unused = {name for name in before if name.startswith("model.layers") and "experts" in name}
    assert set(before) - changed(trainer.model, before) <= unused


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_sft_with_adapters_saves_adapters(shape, tmp_path, tokenizer):
    args = SFTConfig(**settings(tmp_path, packing=True, max_length=64))
    dataset = Dataset.from_dict({"prompt": [text[:8] for text in TEXTS], "completion": [text[8:] for text in TEXTS]})
    trainer = SFTTrainer(model_of(shape), args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora())
    trainer.train()
    assert len(losses(trainer)) == 2
    trainer.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_sft_with_checkpointing_has_the_losses_of_sft_without(shape, adapters, tmp_path, tokenizer):
    seen = []
    for checkpointing in (False, True):
        args = SFTConfig(**settings(tmp_path, max_steps=3, gradient_checkpointing=checkpointing, max_length=32))
        torch.manual_seed(0)
        trainer = SFTTrainer(
            model_of(shape), args, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer,
            peft_config=lora() if adapters else None,
        )  # fmt: skip
        trainer.train()
        seen.append(losses(trainer))
    assert seen[1] == pytest.approx(seen[0], abs=1e-4) and len(set(seen[0])) == 3


def test_sft_with_checkpointing_and_balance_loss(tmp_path, tokenizer):
    model = model_of("moe", output_router_logits=True, router_aux_loss_coef=0.5)
    args = SFTConfig(**settings(tmp_path, gradient_checkpointing=True, max_length=32))
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer)
    trainer.train()
    assert all("aux_loss" in line for line in trainer.state.log_history if "loss" in line)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_dpo(shape, adapters, tmp_path, tokenizer):
    dataset = Dataset.from_dict({
        "prompt": [text[:10] for text in TEXTS], "chosen": [text[10:] for text in TEXTS],
        "rejected": ["    pass\n" for _ in TEXTS],
    })  # fmt: skip
    model = model_of(shape)
    before = copy_of(model)
    args = DPOConfig(**settings(tmp_path, max_length=64))
    trainer = DPOTrainer(
        model, ref_model=None if adapters else model_of(shape), args=args, train_dataset=dataset,
        processing_class=tokenizer, peft_config=lora() if adapters else None,
    )  # fmt: skip
    trainer.train()
    first = losses(trainer)[0]
    assert first == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are one
    if not adapters:
        assert changed(trainer.model, before)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_grpo(shape, adapters, tmp_path, tokenizer):
    model = model_of(shape)
    before = copy_of(model)
    args = GRPOConfig(**settings(tmp_path, per_device_train_batch_size=4, num_generations=4, max_completion_length=8))
    asked = []

    def reward(completions, **_):
        asked.append(completions)
        return [float(sum(c in "aeiou" for c in text)) + 0.1 * len(text) for text in completions]

    trainer = GRPOTrainer(
        model, reward_funcs=reward, args=args, train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer, peft_config=lora() if adapters else None,
    )  # fmt: skip
    trainer.train()
    assert len(asked) == 2 and all(len(completions) == 4 for completions in asked)
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    if not adapters:
        assert changed(trainer.model, before)


def test_a_name_gives_transformers_own_class(tmp_path, tokenizer):
    """TRL looks a class up by name in transformers, past the Auto classes: hand in models, not names, ref_model too."""
    model_of().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = SFTConfig(**settings(tmp_path / "run", max_length=32))
    trainer = SFTTrainer(str(tmp_path / "model"), args, train_dataset=Dataset.from_dict({"text": TEXTS}))
    assert type(trainer.model) is NativeForCausalLM
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = SFTTrainer(given, args, train_dataset=Dataset.from_dict({"text": TEXTS}))  # its tokenizer by its path
    assert type(trainer.model) is NemotronHForCausalLM
    trainer.train()
