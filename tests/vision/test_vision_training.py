"""Fine-tuning a vision-language model: rows of records with pictures, the stages, going on, TRL's trainer as it is."""

import base64
import io
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vl_tiny import IMAGE, SIDE, prompt, tiles, vl_model, vl_processor, word_tokenizer

from nemotron_h_cli import main
from nemotron_h_hf.data.pictures import PictureCollator, encode_pictures
from nemotron_h_hf.training.fp8 import fp8_module_names

TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + '<eos>\n' }}{% endfor %}"
SHORT = ["--sequence_length", "96", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--use_cpu", "true",
         "--learning_rate", "0.01"]  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return vl_processor(tokenizer=tokenizer)


@pytest.fixture(scope="module")
def start(processor, tmp_path_factory):
    """A folder with a model, and one with pictures and records of every layout."""
    root = tmp_path_factory.mktemp("vl")
    vl_model(image_token_id=processor.image_token_id).save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    data = root / "data"
    data.mkdir()
    for name, size in (("wide", (2 * SIDE, SIDE)), ("square", (SIDE, SIDE))):
        Image.new("RGB", size, "red").save(data / f"{name}.png")
    code = base64.b64encode((data / "square.png").read_bytes()).decode()
    question = [{"type": "image", "path": "wide.png"}, {"type": "text", "text": "what is this?"}]
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]},
        {"messages": [{"role": "user", "content": "<image>this?<image>"}, {"role": "assistant", "content": "two pictures"}],
         "images": ["square.png", "square.png"]},
        {"prompt": "<image>what is this?", "completion": "a cat", "image": code},
        {"messages": [{"role": "user", "content": "what is a cat?"}, {"role": "assistant", "content": "this"}]},
    ]  # fmt: skip
    bad = [
        {"prompt": "<image>", "completion": "a", "image": "missing.png"},
        {"prompt": "a", "completion": "a", "image": code},
    ]
    lines = [json.dumps(record) for record in [*records, *bad]]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    (data / "held_out.jsonl").write_text("\n".join(lines[:4]) + "\n")
    return root


def sft(start, out, *more: str) -> int:
    given = ["--model", str(start / "model"), "--data", str(start / "data" / "train.jsonl"), "--output_dir", str(out)]
    return main(["sft", *given, *SHORT, *more])


def test_labels_of_a_record(processor, start):
    """Only what the assistant says, whatever the layout; tokens as the processor has them for the same conversation."""
    record = json.loads((start / "data" / "train.jsonl").read_text().splitlines()[0])
    row = encode_pictures(record, processor, start / "data")
    tokenizer = processor.tokenizer
    picture = Image.open(start / "data" / "wide.png")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>what is this?"}, {"role": "assistant", "content": "a cat"}], tokenize=False
    )
    expected = processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
    assert row["input_ids"].tolist() == expected.input_ids[0].tolist()
    assert torch.equal(row["pixel_values"], expected.pixel_values) and len(row["pixel_values"]) == 3
    learnt = row["input_ids"][row["labels"] != -100]
    assert tokenizer.convert_ids_to_tokens(learnt) == ["a", " ", "cat", "<eos>"]


def test_nothing_on_a_picture_or_its_tags_is_learnt(processor, start):
    row = encode_pictures({"text": "cat<image>cat", "image": str(start / "data" / "wide.png")}, processor)
    words = processor.tokenizer.convert_ids_to_tokens(row["input_ids"][row["labels"] != -100])
    assert "tile" not in words and "<image>" not in words and words.count("cat") == 2


def test_a_batch_of_rows_equals_the_rows_alone(processor, start):
    lines = (start / "data" / "held_out.jsonl").read_text().splitlines()
    rows = [encode_pictures(json.loads(line), processor, start / "data") for line in lines]
    batch = PictureCollator(0)(rows)
    model = AutoModelForImageTextToText.from_pretrained(start / "model").eval()
    with torch.no_grad():
        together = model(**batch, num_items_in_batch=1).loss
        alone = sum(model(**PictureCollator(0)([row]), num_items_in_batch=1).loss for row in rows)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)
    assert batch["pixel_values"].shape[0] == 3 + 2 + 1


@pytest.mark.parametrize("stage", ["projector", "all"])
def test_a_stage_changes_what_it_says(start, stage, tmp_path, capsys):
    held_out = ["--eval_data", str(start / "data" / "held_out.jsonl")]
    assert sft(start, tmp_path / "run", "--train", stage, "--max_steps", "8", *held_out) == 0
    losses = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert losses["after"] < losses["before"]
    before, after = (
        AutoModelForImageTextToText.from_pretrained(path) for path in (start / "model", tmp_path / "run" / "model")
    )
    changed = {name for name, weight in before.named_parameters() if not torch.equal(weight, after.get_parameter(name))}
    parts = {name.split(".")[1] if name.startswith("model.") else name for name in changed}
    wanted = {"multi_modal_projector"} if stage == "projector" else {"multi_modal_projector", "vision_tower", "language_model",
                                                                       "lm_head.weight"}  # fmt: skip
    assert parts == wanted
    assert type(AutoProcessor.from_pretrained(tmp_path / "run" / "model")).__name__ == "NemotronHVLProcessor"


def test_a_run_goes_on_with_the_very_next_record(start, tmp_path):
    steps = ["--train", "projector", "--save_steps", "2"]
    assert sft(start, tmp_path / "whole", *steps, "--max_steps", "4", "--lr_scheduler_type", "constant") == 0
    assert sft(start, tmp_path / "run", *steps, "--max_steps", "2", "--lr_scheduler_type", "constant") == 0
    shutil.rmtree(tmp_path / "run" / "model")
    assert sft(start, tmp_path / "run", *steps, "--max_steps", "4", "--lr_scheduler_type", "constant") == 0
    whole, run = (AutoModelForImageTextToText.from_pretrained(tmp_path / name / "model") for name in ("whole", "run"))
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(weight, run.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_adapters_are_on_language_model_and_projector(start, tmp_path):
    from peft import PeftModel

    assert sft(start, tmp_path / "run", "--lora_rank", "2", "--max_steps", "2", "--lora_alpha", "64") == 0
    base = AutoModelForImageTextToText.from_pretrained(start / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    places = {name for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert any("multi_modal_projector.linear_1" in name for name in places) and any(
        "in_proj" in name for name in places
    )
    assert not any("vision_tower" in name for name in places)
    assert main(["merge", str(tmp_path / "run" / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    batch = prompt([3, "1", 4])
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, merged.config.image_token_id)
    with torch.no_grad():
        wanted = adapted(ids, pixel_values=tiles(1)).logits
        torch.testing.assert_close(merged(ids, pixel_values=tiles(1)).logits, wanted, atol=1e-4, rtol=1e-4)
    assert type(AutoProcessor.from_pretrained(tmp_path / "merged")).__name__ == "NemotronHVLProcessor"


def test_fp8_is_of_the_language_model():
    names = fp8_module_names(vl_model())
    assert names and all(name.startswith("model.language_model.layers.") for name in names)
    assert len(names) == len(fp8_module_names(vl_model().config.text_config))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "lora"], "lora together with --lora_rank"),
        (["--train", "projector", "--lora_rank", "2"], "lora together with --lora_rank"),
        (["--long_context", "true"], "none for a vision-language model"),
    ],
)
def test_flags_that_contradict_each_other(start, flags, message, tmp_path, capsys):
    assert sft(start, tmp_path / "run", "--max_steps", "1", *flags) == 1
    assert message in capsys.readouterr().err


def test_stages_are_none_of_a_text_models(tmp_path, start, capsys):
    assert (
        main(
            [
                "sft",
                "--data",
                str(start / "data" / "train.jsonl"),
                "--train",
                "projector",
                "--output_dir",
                str(tmp_path),
            ]
        )
        == 1
    )
    assert "none for a text model" in capsys.readouterr().err


def test_trl_trains_it_as_it_is(start, processor, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    def png(shade: str) -> dict:
        file = io.BytesIO()
        Image.new("RGB", (2 * SIDE, SIDE), shade).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    messages = [[{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a cat"}]] * 4
    rows = {"messages": messages, "images": [[png(shade)] for shade in ("red", "blue", "green", "white")]}
    turn = {"role": Value("string"), "content": Value("string")}
    data = Dataset.from_dict(rows, features=Features({"messages": List(turn), "images": List(ImageFeature())}))
    model = AutoModelForImageTextToText.from_pretrained(start / "model")
    before = model.model.multi_modal_projector.linear_1.weight.detach().clone()
    settings = trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
                             report_to=[], learning_rate=1e-2, max_length=None, gradient_checkpointing=False)  # fmt: skip
    own = AutoProcessor.from_pretrained(start / "model")
    own.chat_template = own.tokenizer.chat_template = PREAMBLE + TEMPLATE
    trl.SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=own).train()
    assert not torch.equal(before, model.model.multi_modal_projector.linear_1.weight)


from nemotron_h_hf.model.processing_nemotron_h_vl import CHAT_PREAMBLE as PREAMBLE  # noqa: E402
