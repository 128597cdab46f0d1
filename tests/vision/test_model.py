"""The vision-language model: joining, generation in every way, gradients, labels, adapters, bad input."""

import copy
import json
from inspect import signature

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, InternVLVisionModel
from transformers.models.radio.modeling_radio import RadioModel
from vl_tiny import EXPERTS, IMAGE, SIDE, prompt, released_model, tiles, vl_model

from nemotron_h_hf import HybridCache, NemotronHForCausalLM, NemotronHVLConfig, NemotronHVLForConditionalGeneration
from nemotron_h_hf.model.modeling_nemotron_h_vl import NemotronHVLProjector, mask_image_labels, pixel_shuffle

NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    """One that never says the image token."""
    model = vl_model()
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = 0
    return model


def test_pixel_shuffle_is_megatrons_second_version():
    """Against its words: channels of pairs of a row, then of pairs of a column, the place of a square as in the grid."""
    x = torch.randn(2, 4, 6, 3)
    expected = torch.empty(2, 2, 3, 12)
    for r in range(2):
        for c in range(3):
            square = [x[:, 2 * r + i, 2 * c + j] for i in range(2) for j in range(2)]
            expected[:, r, c] = torch.cat(square, -1)
    assert torch.equal(pixel_shuffle(x, 0.5), expected)


@pytest.mark.parametrize(("norm", "act"), [("rms_norm", "relu2"), ("layer_norm", "gelu")])
def test_projector_in_float64(norm, act):
    config = vl_model(projector_norm=norm, projector_hidden_act=act).config
    projector = NemotronHVLProjector(config).double()
    nn.init.uniform_(projector.layer_norm.weight, 0.5, 1.5)
    x = torch.randn(3, 128, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if norm == "layer_norm" else x
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * projector.layer_norm.weight
    hidden = normed @ projector.linear_1.weight.T
    hidden = hidden.clamp(min=0) ** 2 if act == "relu2" else hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(projector(x), hidden @ projector.linear_2.weight.T, atol=1e-6, rtol=1e-6)
    assert [name for name, _ in projector.named_parameters() if "linear" in name and "bias" in name] == []


def test_embeddings_stand_where_the_text_says(model):
    """Rows with 3 and 1 tiles, one token after the other by hand."""
    batch, pixels = prompt([2, "2", 3, "1", 1], [4, "1", 9]), tiles(4)
    images = torch.cat(model.get_image_features(pixels).pooler_output)
    embeds, place = [], 0
    for row in batch["input_ids"].tolist():
        line = []
        for token in row:
            line.append(images[place] if token == IMAGE else model.get_input_embeddings().weight[token])
            place += token == IMAGE
        embeds.append(torch.stack(line))
    mask = batch["attention_mask"]
    expected = model(inputs_embeds=torch.stack(embeds), attention_mask=mask).logits
    torch.testing.assert_close(model(**batch, pixel_values=pixels).logits, expected)


@pytest.mark.parametrize("left", [True, False])
def test_each_row_equals_the_row_alone(model, left):
    rows, counts = ([2, "2", 3, "1", 1], [4, "1", 2], [7]), (3, 1, 0)
    batch, pixels = prompt(*rows, left=left), tiles(4)
    together = model(**batch, pixel_values=pixels).logits
    start = 0
    for row, count in enumerate(counts):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real][None]
        own = {"pixel_values": pixels[start : start + count]} if count else {}
        torch.testing.assert_close(together[row][real], model(ids, **own).logits[0], atol=1e-4, rtol=1e-4)
        start += count


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
        {"cache_implementation": "offloaded"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_generation_is_the_same_in_every_way(model, how):
    rows = [[2, "2", 3, "1", 1], [4, "1", 2]][: 1 if "prompt_lookup_num_tokens" in how else 2]
    batch, pixels = prompt(*rows), tiles(4 if len(rows) == 2 else 3)
    expected = greedy(model, batch, pixels)
    assert torch.equal(model.generate(**batch, pixel_values=pixels, **NEW, **how), expected)


def greedy(model, batch: dict, pixels: torch.Tensor) -> torch.Tensor:
    """Token by token, the whole input each time."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(NEW["max_new_tokens"]):
        logits = model(ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    return ids


def test_multi_token_prediction_drafts_after_pictures():
    model = vl_model(text={"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*-"}).eval()
    batch, pixels = prompt([2, "2", 3, "1", 1], [4, "1", 2]), tiles(4)
    expected = model.generate(**batch, pixel_values=pixels, **NEW)
    assert torch.equal(model.generate(**batch, pixel_values=pixels, **NEW, num_mtp_tokens=2), expected)


def test_decoding_after_right_padding(model):
    """One more token per row, after a prompt whose padding stands on the right."""
    rows, counts = ([2, "2", 3, "1", 1], [4, "1", 2]), (3, 1)
    batch, pixels, cache = prompt(*rows, left=False), tiles(4), HybridCache(model.config.text_config)
    model(**batch, pixel_values=pixels, cache=cache)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    after = model(torch.tensor([[7], [9]]), attention_mask=mask, cache=cache).logits[:, 0]
    start = 0
    for row, count in enumerate(counts):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        ids = torch.cat([ids, torch.tensor([[7], [9]])[row]])[None]
        alone = model(ids, pixel_values=pixels[start : start + count]).logits[0, -1]
        torch.testing.assert_close(after[row], alone, atol=1e-4, rtol=1e-4)
        start += count


def test_beams_see_the_images_of_their_row(model):
    rows, pixels = ([2, "2", 3, "1", 1], [4, "1", 2]), tiles(4)
    together = model.generate(**prompt(*rows), pixel_values=pixels, num_beams=3, **NEW)
    cut = [(0, 3), (3, 4)]
    lines = prompt(*rows)
    for row, (start, end) in enumerate(cut):
        real = lines["attention_mask"][row].bool()
        ids = lines["input_ids"][row][real][None]
        alone = model.generate(ids, pixel_values=pixels[start:end], num_beams=3, **NEW)
        assert torch.equal(alone[0, ids.shape[1] :], together[row, lines["input_ids"].shape[1] :])


def test_images_are_seen_once_per_generation(model):
    seen = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    model.generate(**prompt([2, "2", 3]), pixel_values=tiles(2), num_beams=2, **NEW)
    handle.remove()
    assert len(seen) == 1


def test_a_conversation_goes_on_from_its_cache(model):
    """The second prompt holds the first; its pictures are both given, and those that the cache has seen are left out."""
    first = prompt([3, "1", 2])
    cache = HybridCache(model.config.text_config)
    start = model.generate(**first, pixel_values=tiles(1), cache=cache, **NEW)
    more = torch.cat([start, prompt([2, "2", 4], seed=5)["input_ids"]], 1)
    pixels = torch.cat([tiles(1), tiles(2, seed=7)])
    expected = greedy(model, {"input_ids": more, "attention_mask": torch.ones_like(more)}, pixels)
    assert torch.equal(model.generate(more, pixel_values=pixels, cache=cache, **NEW), expected)


def test_generation_from_embeddings(model):
    batch, pixels = prompt([2, "2", 3]), tiles(2)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    expected = model.generate(**batch, pixel_values=pixels, **NEW)[:, -6:]
    found = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], pixel_values=pixels, **NEW)
    assert torch.equal(found, expected)


def test_long_prompts_run_in_parts(model, monkeypatch):
    batch, pixels = prompt([300, "3", 300]), tiles(3)
    with torch.no_grad():
        expected = model(**batch, pixel_values=pixels).logits
        monkeypatch.setattr(type(model.model.language_model), "tokens_per_pass", {"cpu": 256})
        torch.testing.assert_close(model(**batch, pixel_values=pixels).logits, expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_everything_and_checkpointing_keeps_them():
    model = vl_model().train()
    batch, pixels = prompt([2, "2", 6]), tiles(2)
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, pixel_values=pixels, labels=batch["input_ids"]).loss.backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters()})
    without = {name for name, grad in grads[0].items() if grad is None}
    assert without == set(), without
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


def test_labels_on_images_and_before_one_count_nowhere(model):
    ids = prompt([3, "2", 4])["input_ids"]
    masked = mask_image_labels(ids, ids, IMAGE)
    assert masked[0].tolist() == [*ids[0, :2].tolist(), *[-100] * 9, *ids[0, 11:].tolist()]
    logits = model(ids, pixel_values=tiles(2)).logits[0, :-1].double()
    kept = masked[0, 1:] != -100
    expected = nn.functional.cross_entropy(logits[kept], ids[0, 1:][kept])
    loss = model(ids, pixel_values=tiles(2), labels=ids).loss
    torch.testing.assert_close(loss, expected.float())
    other = ids.clone()
    other[0, 2:11] = 5
    assert model(ids, pixel_values=tiles(2), labels=other).loss == loss


def test_lora_trains_and_merges():
    model = get_peft_model(vl_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    batch, pixels = prompt([2, "2", 6]), tiles(2)
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    parts = ("vision_tower", "multi_modal_projector.linear_1", "language_model", "mixer.out_proj")
    for part in parts:
        assert any(part in name for name in adapted), part
    model.train()
    model(**batch, pixel_values=pixels, labels=batch["input_ids"]).loss.backward()
    model.eval()
    with torch.no_grad():
        before = model(**batch, pixel_values=pixels).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch, pixel_values=pixels).logits, before, atol=1e-4, rtol=1e-4)


def test_an_image_token_past_the_vocabulary():
    """Nano VL's token is the first after the language model's words."""
    model = vl_model(image_token_id=131072)
    ids = prompt([2, "1", 3])["input_ids"]
    expected = vl_model()(ids, pixel_values=tiles(1)).logits
    ids = ids.masked_fill(ids == IMAGE, 131072)
    torch.testing.assert_close(model(ids, pixel_values=tiles(1)).logits, expected)


@pytest.mark.skipif(
    "image_grid_hw" not in signature(RadioModel.forward).parameters, reason="needs a newer transformers"
)
def test_grids_of_any_size_equal_their_image_alone():
    model = released_model("omni")
    grids = torch.tensor([[4, 6], [2, 4]])
    pixels = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    together = model.get_image_features(pixels, grids).pooler_output
    assert [part.shape[0] for part in together] == [6, 2]
    for part, own, grid in zip(together, pixels.split([24, 8]), grids):
        alone = model.get_image_features(own, grid[None]).pooler_output[0]
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=1e-5)


def test_a_mixture_of_experts_and_its_router_loss():
    model = vl_model(text={**EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.1})
    batch = prompt([2, "2", 6])
    output = model(**batch, pixel_values=tiles(2), labels=batch["input_ids"])
    assert output.aux_loss > 0 and len(output.router_logits) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pixel_values": tiles(1)}, "the text has 8 image tokens .* the 1 tiles given have 4 embeddings"),
        ({"pixel_values": tiles(3)}, "the text has 8 image tokens .* the 3 tiles given have 12 embeddings"),
        ({}, "0 images are given"),
        ({"pixel_values": tiles(2)[:, :1]}, r"pixel_values has shape \(2, 1, 28, 28\)"),
    ],
)
def test_texts_and_images_that_do_not_fit(model, given, message):
    with pytest.raises(ValueError, match=message):
        model(**prompt([2, "2", 3]), **given)


def test_images_given_to_a_text_model(model):
    text = NemotronHForCausalLM(model.config.text_config)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixel_values'"):
        text(torch.tensor([[3, 4]]), pixel_values=tiles(1))


def test_text_without_images_is_the_language_models(model):
    ids = prompt([9])["input_ids"]
    text = NemotronHForCausalLM(model.config.text_config).eval()
    text.load_state_dict({name.replace("model.language_model.", "model."): weight
                          for name, weight in model.state_dict().items() if "language_model" in name or "lm_head" in name})  # fmt: skip
    torch.testing.assert_close(model(ids).logits, text(ids).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 30}, "image_size=30: allowed is a multiple of 14"),
        ({"downsample_ratio": 0.3}, "downsample_ratio=0.3: allowed is one over a whole number"),
        ({"projector_norm": "batch_norm"}, "projector_norm='batch_norm': allowed is one of rms_norm, layer_norm"),
        ({"projector_hidden_act": "swish2"}, "projector_hidden_act='swish2': allowed is one of"),
        ({"max_tiles": 13}, "max_tiles=13: allowed is at most 12 with tile tags"),
        ({"image_token_id": -1}, "image_token_id=-1: allowed is a token's number"),
        ({"projector_hidden_size": 0}, "projector_hidden_size=0: allowed is a positive integer"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        vl_model(**fields)


def test_a_tower_whose_width_does_not_fit_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["vision_config"]["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"has .* in shape .*, its config asks for"):
        type(model).from_pretrained(tmp_path)
    assert SIDE == 28


def test_images_are_never_ignored(model):
    """What excludes each other, does not fit the text, or is not known is refused in every forward."""
    batch, pixels = prompt([2, "1", 4]), tiles(1)
    ids, text = batch["input_ids"], prompt([9])["input_ids"]
    features = model.model.features_by_row(ids == IMAGE, pixels, None)
    torch.testing.assert_close(model(ids, image_features=features).logits, model(ids, pixel_values=pixels).logits)
    wrong = [
        (ids, {"pixel_values": pixels, "image_features": features}, "both given"),
        (text, {"image_grid_hw": torch.tensor([[4, 4]])}, "image_grid_hw"),
        (ids, {"pixel_values": pixels, "inputs_embeds": model.get_input_embeddings()(text)}, "exactly one"),
        (None, {"pixel_values": pixels}, "exactly one"),
        (text, {"image_features": features}, "image_features"),
        (ids, {"image_features": features[:, :2]}, "image_features"),
        (ids, {"image_features": features[..., :3]}, "image_features"),
        (ids, {"image_features": features.expand(2, -1, -1)}, "image_features"),
    ]
    for forward in (model, model.model):
        for tokens, images, message in wrong:
            with pytest.raises(ValueError, match=message):
                forward(tokens, **images)
        for name in ("image_flags", "images", "cache_params", "num_logits_to_keep"):
            with pytest.raises(TypeError, match=name):
                forward(ids, pixel_values=pixels, **{name: None})
        with pytest.raises(TypeError, match="image_flags"):
            forward.get_image_features(pixels, image_flags=None)
    with pytest.raises(ValueError, match="mtp_loss_weight"):
        model(ids, pixel_values=pixels, labels=ids, mtp_loss_weight=0.1)


@pytest.mark.parametrize("where", ["argument", "config"])
def test_tuples(where):
    """`return_dict=False` holds for both classes, wherever it is said."""
    model, batch, pixels = vl_model(), prompt([2, "1", 4]), tiles(1)
    ids, asked = batch["input_ids"], {"return_dict": False} if where == "argument" else {}
    expected = [forward(ids, pixel_values=pixels).to_tuple() for forward in (model, model.model)]
    parts = model.get_image_features(pixels).pooler_output
    model.config.return_dict = where == "argument"
    for forward, outputs in zip((model, model.model), expected):
        given = forward(ids, pixel_values=pixels, **asked)
        assert type(given) is tuple and len(given) == len(outputs)
        assert torch.equal(given[0], outputs[0])
        assert torch.equal(forward.get_image_features(pixels, **asked)[1][0], parts[0])


def test_shifted_labels_skip_images_too(model):
    batch, pixels = prompt([2, "1", 4, "2"], [5, "1", 3]), tiles(4)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**batch, pixel_values=pixels, labels=labels).loss
    torch.testing.assert_close(model(**batch, pixel_values=pixels, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_by_accelerate(model, kind, tmp_path):
    """accelerate leaves weights on the meta device between calls; pictures stay where they are."""
    batch, pixels = prompt([2, "1", 4]), tiles(1)
    expected = model.generate(**batch, pixel_values=pixels, **NEW)
    away = copy.deepcopy(model)
    cpu_offload(away, "cpu") if kind == "cpu" else disk_offload(away, tmp_path, "cpu")
    assert torch.equal(away.generate(**batch, pixel_values=pixels, **NEW), expected)


def test_a_save_of_the_bare_stack_gives_a_fresh_head(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    loaded, info = NemotronHVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    batch, pixels = prompt([2, "1", 4]), tiles(1)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert torch.equal(loaded.model(**batch, pixel_values=pixels)[0], model.model(**batch, pixel_values=pixels)[0])


TOWERS = ("pixtral", "vit", "dinov2", "radio", "internvl_vision", "siglip_vision_model", "clip_vision_model", "dinov3_vit",
          "dinov2_with_registers", "beit", "data2vec-vision", "ijepa", "deit", "vit_mae")  # fmt: skip


@pytest.mark.parametrize("kind", TOWERS)
def test_other_towers_keep_their_weights(kind, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {"model_type": kind, **sizes, "image_size": 32, "patch_size": 8}
    text = vl_model().config.text_config.to_dict()
    config = NemotronHVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, image_size=32)
    whole = NemotronHVLForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    again = NemotronHVLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.state_dict().items())


def test_the_tower_alone_is_an_ordinary_internvit(model, tmp_path):
    tower = model.model.vision_tower
    tower.save_pretrained(tmp_path)
    again = InternVLVisionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tower.state_dict().items())
    AutoModel.from_config(model.config.vision_config)  # which has got nothing that transformers' own class refuses
