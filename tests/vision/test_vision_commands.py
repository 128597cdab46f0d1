"""make-vl, generate --image, info and the card of a vision-language model; transformers' pipeline."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)
from vl_tiny import IMAGE, INTERNVIT, RADIO, SIDE, TEXT, released_model, spread, vl_model, vl_processor, word_tokenizer

from nemotron_h_cli import main
from nemotron_h_hf import EMBEDDED_MODEL, NemotronHConfig, NemotronHForCausalLM, hub
from nemotron_h_hf.scripts import make_vl

TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a language model with a tokenizer and a chat template, and of two towers."""
    root = tmp_path_factory.mktemp("parts")
    spread(NemotronHForCausalLM(NemotronHConfig(**TEXT))).save_pretrained(root / "text")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "text")
    for name, fields in (("internvit", INTERNVIT), ("radio", {"model_type": "radio", "image_size": 32, **RADIO})):
        spread(AutoModel.from_config(AutoConfig.for_model(**fields))).save_pretrained(root / name)
    return root


def make(parts, tower: str, out, *more: str) -> int:
    return main(
        ["make-vl", "--language-model", str(parts / "text"), "--vision-model", str(parts / tower), str(out), *more]
    )


@pytest.mark.parametrize("tower", ["internvit", "radio"])
def test_both_parts_are_joined_unchanged(parts, tower, tmp_path, capsys):
    assert make(parts, tower, tmp_path / "vl") == 0
    said = capsys.readouterr().out
    assert "projector  fresh" in said and "embeddings per tile" in said
    joined = AutoModelForImageTextToText.from_pretrained(tmp_path / "vl")
    alone = AutoModel.from_pretrained(parts / tower)
    for name, weight in alone.state_dict().items():
        own = (
            joined.model.conditioner.state_dict()
            if name.startswith("input_cond")
            else joined.model.vision_tower.state_dict()
        )
        assert torch.equal(own[name.removeprefix("input_conditioner.")], weight), name
    text = AutoModelForCausalLM.from_pretrained(parts / "text")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(joined(ids).logits, text(ids).logits)
    processor = AutoProcessor.from_pretrained(tmp_path / "vl")
    side = SIDE if tower == "internvit" else 32
    inputs = processor(images=Image.new("RGB", (2 * side, side)), text="what is <image>?", return_tensors="pt")
    assert inputs.pixel_values.shape == (3, 3, side, side)
    joined.generate(**inputs, max_new_tokens=2)
    content = [{"type": "image"}, {"type": "text", "text": "a?"}]
    assert processor.apply_chat_template([{"role": "user", "content": content}]) == "user <image>a?\n"
    assert make(parts, tower, tmp_path / "vl") == 0 and "already there and whole" in capsys.readouterr().out


def test_a_tokenizer_without_image_token_gets_one_and_the_model_a_row(tmp_path):
    """The model in the box; its tokenizer cuts the tags to different lengths, which is refused."""
    spread(AutoModel.from_config(AutoConfig.for_model(**INTERNVIT))).save_pretrained(tmp_path / "tower")
    given = [
        "make-vl",
        "--language-model",
        EMBEDDED_MODEL,
        "--vision-model",
        str(tmp_path / "tower"),
        str(tmp_path / "vl"),
    ]
    assert main(given) == 1 and not (tmp_path / "vl" / "config.json").exists()
    assert main([*given, "--tile-tags", "no"]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "vl")
    assert model.config.image_token_id == 2048 and model.lm_head.weight.shape[0] == 2049
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--language-model": "internvit"}, "is a internvl_vision: allowed is a nemotron_h"),
        ({"--vision-model": "text"}, "without patch_size: allowed is a vision tower"),
        ({"--vision-model": "preset:vgg"}, "allowed presets are internvit-300m, radio-h"),
        ({"--image-size": "30"}, "image_size=30: allowed is a multiple of 14"),
    ],
)
def test_parts_that_cannot_be_joined(parts, change, message, tmp_path, capsys):
    given = {"--language-model": str(parts / "text"), "--vision-model": str(parts / "internvit")}
    given |= {name: str(parts / value) if value in ("text", "internvit") else value for name, value in change.items()}
    assert main(["make-vl", *(word for pair in given.items() for word in pair), str(tmp_path / "vl")]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vision-language checkpoint with its processor, and a picture."""
    root = tmp_path_factory.mktemp("vl")
    processor = vl_processor(chat_template="{{ messages[0].content }}")
    model = vl_model(image_token_id=processor.image_token_id)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    Image.new("RGB", (2 * SIDE, SIDE), "red").save(root / "red.png")
    return root


def test_generate_with_pictures(folder, capsys):
    given = ["generate", "--model", str(folder / "model"), "--max-new-tokens", "5", "--temperature", "0"]
    picture = ["--image", str(folder / "red.png")]
    assert main([*given, *picture, *picture, "--prompt", "what is this?"]) == 0
    first = capsys.readouterr()
    model, processor = (auto.from_pretrained(folder / "model") for auto in (AutoModelForImageTextToText, AutoProcessor))
    image = Image.open(folder / "red.png")
    inputs = processor(images=[image, image], text="<image><image>what is this?", return_tensors="pt")
    expected = processor.tokenizer.decode(
        model.generate(**inputs, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True
    )
    assert first.out.strip() == expected.strip() and f"{inputs.input_ids.shape[1]} prompt tokens" in first.err
    assert main([*given, "--prompt", "this is a cat"]) == 0


def test_pictures_for_a_text_model_and_pictures_that_are_none(folder, capsys):
    picture = ["--image", str(folder / "red.png")]
    assert main(["generate", *picture]) == 1
    assert "a nemotron_h reads text alone" in capsys.readouterr().err
    given = ["generate", "--model", str(folder / "model")]
    assert main([*given, "--image", "nothing.png"]) == 1 and "'nothing.png' is no file" in capsys.readouterr().err
    assert main([*given, *picture, "--prompt", "<image><image>"]) == 1
    assert "the text has 2 <image>, 1 pictures are given" in capsys.readouterr().err


def test_the_pipeline_of_transformers(folder):
    ask = pipeline("image-text-to-text", model=str(folder / "model"))
    image = Image.open(folder / "red.png")
    found = ask(images=[image], text="<image>what is this?", max_new_tokens=4, do_sample=False, return_full_text=False)
    model, processor = ask.model, ask.processor
    inputs = processor(images=[image], text="<image>what is this?", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert found[0]["generated_text"].strip() == processor.decode(new, skip_special_tokens=True).strip()


def test_info_shows_tower_projector_and_tokens(folder, capsys):
    assert main(["info", str(folder / "model"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").model
    vision = told["vision"]
    assert vision["tower_parameters"] == sum(weight.numel() for weight in model.vision_tower.parameters())
    assert vision["projector_parameters"] == sum(weight.numel() for weight in model.multi_modal_projector.parameters())
    assert (vision["tokens_per_tile"], vision["max_tiles"], vision["tower"]) == (4, 13, "internvl_vision")
    assert told["pattern"] == TEXT["hybrid_override_pattern"] and told["problems"] == []
    assert main(["info", str(folder / "model")]) == 0
    text = capsys.readouterr().out
    assert "RMSNorm, 128 -> 40 (relu2) -> 48" in text and "1 to 13 tiles: 4 to 52 and a tag for each tile" in text


@pytest.mark.parametrize("kind", ["nano", "omni"])
def test_info_of_released_models(kind, tmp_path, capsys):
    released_model(kind).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert ("tower             radio" in said) and ("as many as its resolution has" in said) == (kind == "omni")


def test_the_card_says_what_it_takes(folder):
    card = hub.plan_upload(folder / "model", "owner/sees", with_code=True)
    text = card["README.md"].decode()
    assert "pipeline_tag: image-text-to-text" in text and "| tokens per image | 4 per tile" in text
    assert "AutoModelForImageTextToText, AutoProcessor" in text and "$" not in text
    maps = json.loads(card["config.json"])["auto_map"], json.loads(card["processor_config.json"])["auto_map"]
    assert maps[0]["AutoModelForImageTextToText"].startswith("modeling_nemotron_h_vl.") and "AutoProcessor" in maps[1]
    assert "processing_nemotron_h_vl.py" in card
    assert IMAGE and "pipeline_tag: text-generation" in hub.model_card(EMBEDDED_MODEL, "owner/text")


@pytest.mark.parametrize("tied", [False, True])
def test_the_row_of_the_image_token_is_the_mean_and_nothing_is_said(parts, tied, capsys, caplog):
    language = spread(NemotronHForCausalLM(NemotronHConfig(**{**TEXT, "tie_word_embeddings": tied})))
    before = [part.weight.detach().clone() for part in (language.get_input_embeddings(), language.lm_head)]
    tokenizer = SimpleNamespace(add_special_tokens=lambda *_, **__: 1, convert_tokens_to_ids=lambda _: 98)
    with caplog.at_level("INFO"):
        assert make_vl.image_token(language, tokenizer) == 98
    for old, part in zip(before, (language.get_input_embeddings(), language.lm_head)):
        assert part.weight.shape[0] == language.config.vocab_size == 99
        assert torch.equal(part.weight[:97], old)
        torch.testing.assert_close(part.weight[97:], old.double().mean(0).float().expand(2, -1))
    assert "mean_resizing" not in caplog.text + "".join(capsys.readouterr())
