"""Fine-tuning a vision-language model under FSDP2 on two CPU processes: the losses and weights of one process, and a whole end."""

import json
import sys

import pytest
import torch
import yaml
from PIL import Image
from test_fsdp import FSDP2, ONE_COPY, held, launch, on_cpu, run
from test_vision_training import TEMPLATE
from tiny_run import read_metrics
from transformers import AutoModelForImageTextToText, AutoProcessor
from vl_tiny import SIDE, vl_model, vl_processor, word_tokenizer

pytestmark = pytest.mark.slow


TOWER = on_cpu("fsdp2", fsdp_transformer_layer_cls_to_wrap="NemotronHBlock,InternVLVisionLayer")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make(tmp_path_factory.mktemp("vl"))


def make(root, **text):
    """A model, pictures and records of unlike lengths, and a run of three steps of four of them."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    processor = vl_processor(tokenizer=tokenizer)
    model = vl_model(image_token_id=processor.image_token_id, text=text)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    for name, size in (("wide", (2 * SIDE, SIDE)), ("square", (SIDE, SIDE))):
        Image.effect_noise(size, 90).convert("RGB").save(root / f"{name}.png")
    lines = [
        {"prompt": "<image>what is this?", "completion": "a cat", "image": "wide.png"},
        {"prompt": "<image>what is a cat? " * 2, "completion": "two pictures", "images": ["square.png", "wide.png"]},
        {"prompt": "what is a cat?", "completion": "this is a cat"},
        {"prompt": "<image>this?", "completion": "a picture, a cat", "image": "square.png"},
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 3))
    settings = {
        "model": str(root / "model"), "data": [str(root / "data.jsonl")], "eval_data": [str(root / "data.jsonl")],
        "use_cpu": True, "sequence_length": 128, "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2,
        "warmup_steps": 0, "lr_scheduler_type": "constant", "per_device_eval_batch_size": 2, "disable_tqdm": True,
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setenv("COMMAND", "sft")


def one(start, output_dir, *flags: str):
    words = [f"--config={start / 'run.yaml'}", f"--output_dir={output_dir}", "--per_device_train_batch_size=4"]
    run([sys.executable, "-m", "nemotron_h_hf.scripts.sft", *words, *flags])


def assert_alike(two, alone) -> None:
    """Losses, gradients' norms and held-out losses, and the weights that were written."""
    for key in ("loss", "grad_norm"):
        found = [[row[key] for row in read_metrics(path) if key in row] for path in (two, alone)]
        assert len(found[0]) == 3 and found[0] == pytest.approx(found[1], rel=1e-4), key
    losses = [json.loads((path / "held_out.json").read_text()) for path in (two, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0]["after"] < losses[0]["before"]


@pytest.mark.parametrize("stage, accelerate", [("all", ONE_COPY), ("projector", TOWER)], ids=["all", "projector"])
def test_two_processes_are_one(start, stage, accelerate, tmp_path):
    """Every layer of the language model is one unit; in the second case those of the frozen tower too."""
    assert_two_are_one(start, tmp_path, stage, accelerate)
    assert held(tmp_path / "two", "model")[1] == 0


def test_a_shared_embedding(tmp_path):
    """One matrix at both ends; each process reads the weights."""
    assert_two_are_one(make(tmp_path, tie_word_embeddings=True), tmp_path, "all", FSDP2)


def assert_two_are_one(start, tmp_path, stage: str, accelerate: dict) -> None:
    one(start, tmp_path / "one", f"--train={stage}")
    launch(start / "run.yaml", tmp_path / "two", 2, -1, f"--train={stage}", accelerate=accelerate)
    assert_alike(tmp_path / "two", tmp_path / "one")
    two, alone, before = (
        AutoModelForImageTextToText.from_pretrained(path)
        for path in (tmp_path / "two" / "model", tmp_path / "one" / "model", start / "model")
    )
    assert AutoProcessor.from_pretrained(tmp_path / "two" / "model").image_token_id == two.config.image_token_id
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), weight, atol=2e-5, rtol=1e-4, msg=name)
        frozen = stage == "projector" and "multi_modal_projector" not in name
        assert torch.equal(two.get_parameter(name), before.get_parameter(name)) == frozen, name


def test_adapters(start, tmp_path):
    flags = ("--lora_rank=2", "--learning_rate=0.01")
    one(start, tmp_path / "one", *flags)
    launch(start / "run.yaml", tmp_path / "two", 2, -1, *flags, accelerate=ONE_COPY)
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_a_crashed_run_goes_on(start, tmp_path):
    launch(start / "run.yaml", tmp_path / "whole", 2, -1, "--train=all", accelerate=ONE_COPY)
    launch(start / "run.yaml", tmp_path / "two", 2, 2, "--train=all", accelerate=ONE_COPY)
    launch(start / "run.yaml", tmp_path / "two", 2, -1, "--train=all", accelerate=ONE_COPY)
    whole, two = ([row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("whole", "two"))
    assert two == pytest.approx(whole, rel=1e-5)
