"""Multimodal Megatron checkpoints: a language model that Megatron wrote, with a tower and a projector laid out by hand next to it.

The tower is transformers' own; its matrices are put into Megatron's order head by head and cut for two tensor-parallel ranks
here, as Megatron-LM's model_converter/internvit_converter.py and radio_converter.py say.
"""

import json
import pickle
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from megatron_fixtures import FIXTURES, assert_same
from nemotron_h_hf.conversion import convert, vision, vision_config
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vl_tiny import IMAGE, INTERNVIT, RADIO, prompt, released_model, spread, tiles, vl_model, word_tokenizer

from nemotron_h_cli import main
from nemotron_h_hf import NemotronHVLConfig, NemotronHVLForConditionalGeneration
from nemotron_h_hf.model.weights import Checkpoint

DENSE = FIXTURES["dense_t2p1_torch"]
TOWERS = {
    "internvit": {**INTERNVIT, "attention_bias": True},
    "radio": {"model_type": "radio", **RADIO, "num_registers": 5, "hidden_act": "gelu_pytorch_tanh"},
}
SIDES = {"internvit": 28, "radio": 32}


def seeing(kind: str) -> NemotronHVLForConditionalGeneration:
    """The fixture's language model behind a spread tower and projector, put together from modules."""
    text = {name: value for name, value in DENSE.config.items() if name != "model_type"}
    config = NemotronHVLConfig(
        text_config=text,
        vision_config=TOWERS[kind],
        image_token_id=IMAGE,
        image_size=SIDES[kind],
        projector_hidden_size=40,
    )
    model = spread(NemotronHVLForConditionalGeneration(config))
    expected = {name: weight.float() for name, weight in DENSE.expected().items()}
    state = {
        name.replace("backbone.", "model.language_model.").replace("embedding.weight", "embeddings.weight"): weight
        for name, weight in expected.items()
    }
    missing, unexpected = torch.nn.Module.load_state_dict(model, state, strict=False)
    assert not unexpected and not any("language_model" in name for name in missing)
    return model


def tower_of(model: NemotronHVLForConditionalGeneration, kind: str, rank: int) -> dict[str, torch.Tensor]:
    """Tower and projector as tensor-parallel rank 0 or 1 of 2 has them."""
    state, found = model.state_dict(), {}

    def half(tensor, axis):
        return tensor.chunk(2, axis)[rank].clone()

    here = "model.vision_tower."
    if kind == "internvit":
        found["vision_model.conv1.weight"] = state[f"{here}embeddings.patch_embeddings.projection.weight"]
        found["vision_model.conv1.bias"] = state[f"{here}embeddings.patch_embeddings.projection.bias"]
        found["vision_model.class_token"] = state[f"{here}embeddings.cls_token"]
        found["vision_model.position_embeddings.weight"] = state[f"{here}embeddings.position_embeddings"][0]
    else:
        found["vision_model.embedder.weight"] = half(state[f"{here}embeddings.patch_projection.weight"], 0)
        found["vision_model.class_token"] = state[f"{here}embeddings.cls_register_token"]
        found["vision_model.position_embeddings"] = state[f"{here}embeddings.position_embedding"]
    attention = {"internvit": ("attention.{}_proj", "attention.projection_layer", "layernorm_before", "layernorm_after"),
                 "radio": ("attention.{}_proj", "attention.o_proj", "norm1", "norm2")}[kind]  # fmt: skip
    for layer in range(2):
        old, new = f"{here}encoder.layer.{layer}.", f"vision_model.decoder.layers.{layer}."
        for part in ("weight", "bias"):
            q, k, v = (state[f"{old}{attention[0].format(word)}.{part}"] for word in "qkv")
            heads = [x[16 * head : 16 * (head + 1)] for head in (0, 1) for x in (q, k, v)]  # head_dim is 16
            found[f"{new}self_attention.linear_qkv.{part}"] = half(torch.cat(heads), 0)
            found[f"{new}mlp.linear_fc1.{part}"] = half(state[f"{old}mlp.fc1.{part}"], 0)
            norms = ("input_layernorm.", "pre_mlp_layernorm.")
            if kind == "radio":  # norms are inside of Transformer Engine's linears
                norms = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
            for stored, norm in zip(attention[2:], norms):
                found[f"{new}{norm}{part}"] = state[f"{old}{stored}.{part}"]
        for module, stored in (("self_attention.linear_proj", attention[1]), ("mlp.linear_fc2", "mlp.fc2")):
            found[f"{new}{module}.weight"] = half(state[f"{old}{stored}.weight"], 1)
            found[f"{new}{module}.bias"] = state[f"{old}{stored}.bias"]
            found[f"{new}{module}._extra_state"] = None
        if kind == "internvit":
            found |= {f"{new}ls{n}": state[f"{old}lambda_{n}"] for n in (1, 2)}
    projector = "model.multi_modal_projector."
    found["vision_projection.encoder.linear_fc1.layer_norm_weight"] = state[f"{projector}layer_norm.weight"]
    found["vision_projection.encoder.linear_fc1.weight"] = half(state[f"{projector}linear_1.weight"], 0)
    found["vision_projection.encoder.linear_fc2.weight"] = half(state[f"{projector}linear_2.weight"], 1)
    return found


class Lenient(pickle.Unpickler):
    """Reads the training arguments without Megatron: its classes become empty ones."""

    def find_class(self, module: str, name: str):
        if module.startswith("megatron"):
            return type(name, (), {"__init__": lambda self, *words: None})
        return super().find_class(module, name)


@pytest.fixture(scope="module")
def ranks():
    """What Megatron saved of the language model on each rank."""
    reader = SimpleNamespace(__name__="pickle", Unpickler=Lenient, load=pickle.load)
    folders = sorted((DENSE.path / "iter_0000100").iterdir())
    return [torch.load(path / "model_optim_rng.pt", weights_only=False, pickle_module=reader) for path in folders]


def write(model, kind: str, ranks: list[dict], folder, change=lambda tensors: None, **args):
    """A run folder of two ranks; the language model's tensors are the bits that Megatron wrote."""
    for rank, kept in enumerate(ranks):
        given = {
            name: value for name, value in vars(kept["args"]).items() if isinstance(value, int | float | str | None)
        }
        given |= {"pixel_shuffle": True, "disable_vision_class_token": True, "vision_projection_type": "mlp", "use_tiling": True,
                  "max_num_tiles": 6, "use_thumbnail": True, "use_tile_tags": True, "img_h": SIDES[kind],
                  "img_w": SIDES[kind], **args}  # fmt: skip
        tensors = tower_of(model, kind, rank) | {f"language_model.{name}": it for name, it in kept["model"].items()}
        change(tensors)
        target = folder / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        target.parent.mkdir(parents=True)
        torch.save({"args": Namespace(**given), "checkpoint_version": 3.0, "iteration": 1, "model": tensors}, target)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


def config_of(model, folder):
    """What a Megatron checkpoint of an unusual tower does not say: heads, and the number of <image>."""
    tower = model.config.vision_config.to_dict()
    folder.mkdir()
    fields = {"model_type": "nemotron_h_vl", "image_token_id": IMAGE, "vision_config": tower, "text_config": {}}
    (folder / "config.json").write_text(json.dumps({**fields, "image_size": model.config.image_size}))
    return folder


@pytest.mark.parametrize("kind", ["internvit", "radio"])
def test_a_multimodal_checkpoint_gives_the_same_logits(kind, ranks, tmp_path):
    model = seeing(kind)
    run = write(model, kind, ranks, tmp_path / "run")
    report = convert(run, tmp_path / "hf", config=config_of(model, tmp_path / "config"), verify_output=True)
    assert report.verified and not report.missing
    read, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert read.config.max_tiles == 6 and read.config.use_tile_tags and read.config.image_size == SIDES[kind]
    batch, pixels = prompt([2, "2", 5]), tiles(2, side=SIDES[kind])
    with torch.no_grad():
        expected = model(**batch, pixel_values=pixels).logits
        assert torch.equal(read(**batch, pixel_values=pixels).logits, expected)
    assert not torch.allclose(model(**batch, pixel_values=pixels * 0).logits, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["internvit", "radio"])
@pytest.mark.parametrize("options", [{}, {"format": "torch"}, {"format": "torch", "tp": 2, "pp": 3}], ids=str)
def test_there_and_back_bit_by_bit(kind, options, tmp_path):
    model = vl_model(vision_config=TOWERS[kind], image_size=SIDES[kind]).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "run", vocab_divisible_by=8, verify_output=True, **options)
    assert report.verified
    convert(tmp_path / "run", tmp_path / "back", config=tmp_path / "hf")
    computed = ("vision_model.radio_model.input_conditioner", "vision_model.radio_model.summary_idxs")
    stored = Checkpoint(tmp_path / "hf")
    assert_same(tmp_path / "back", {name: stored[name] for name in stored if not name.startswith(computed)})
    assert set(report.ignored) == {name for name in stored if name.startswith(computed)}


def test_the_names_of_each_rank(ranks, tmp_path):
    """Two ranks of our own have the very tensors that are laid out by hand."""
    model = seeing("internvit")
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run", format="torch", tp=2, vocab_divisible_by=8)
    for rank in (0, 1):
        path = tmp_path / "run" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        written = torch.load(path, weights_only=False)["model"]
        for name, tensor in tower_of(model, "internvit", rank).items():
            if tensor is not None:
                assert torch.equal(written.pop(name), tensor), name
        assert not [name for name in written if name.startswith("vision")]
        assert {name.removeprefix("language_model.") for name in written} == set(ranks[rank]["model"])


def test_a_released_configuration_is_kept(tmp_path):
    """Nano VL's own config.json and names on disk."""
    model = released_model("nano")
    model.save_pretrained(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "run", vocab_divisible_by=8)
    assert any("GELU by tanh" in note for note in report.notes)
    report = convert(tmp_path / "run", tmp_path / "back", config=tmp_path / "hf", verify_logits=tmp_path / "hf")
    assert report.logits["max_difference"] == 0
    read = AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert type(read) is type(model)
    batch, pixels = prompt([2, "2", 5]), tiles(2, side=32)
    with torch.no_grad():
        assert torch.equal(read(**batch, pixel_values=pixels).logits, model(**batch, pixel_values=pixels).logits)


def test_sizes_that_megatron_sets_itself(ranks, tmp_path):
    """`--language-model-type` and `--vision-model-type` stand for constants of its code, whatever the arguments say."""
    model = seeing("internvit")
    run = write(model, "internvit", ranks, tmp_path / "run", language_model_type="nemotron5-hybrid-8b")
    with pytest.raises(ValueError, match="intermediate_size is 112 by .*, but 21504 by the argument ffn_hidden_size"):
        convert(run, tmp_path / "hf", config=config_of(model, tmp_path / "config"))
    config = NemotronHVLConfig(text_config=model.config.text_config.to_dict())
    assert vision_config.to_args(config)["vision_model_type"] == "internvit300M"
    shapes = {link.megatron[0]: link.shape for link in vision.links(config)}
    assert shapes["vision_model.position_embeddings.weight"] == (1025, 1024)
    assert shapes["vision_model.decoder.layers.23.self_attention.linear_qkv.weight"] == (3072, 1024)
    assert shapes["vision_projection.encoder.linear_fc1.weight"] == (21504, 4096)


REFUSED = {
    "pixel_shuffle": (False, "pixel_shuffle is False: allowed is True"),
    "vision_model_type": ("internvit", "vision_model_type is 'internvit': allowed are internvit300M, radio, cradio-g"),
    "language_model_type": ("qwen2.5_7B", "language_model_type is 'qwen2.5_7B': allowed are nemotron5-hybrid-8b"),
    "dynamic_resolution": (True, "dynamic_resolution is True: allowed is False"),
    "img_w": (56, "img_h=28 and img_w=56: allowed are squares"),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_another_model_is_refused_by_name(argument, ranks, tmp_path):
    model, (value, message) = seeing("internvit"), REFUSED[argument]
    run = write(model, "internvit", ranks, tmp_path / "run", **{argument: value})
    with pytest.raises(ValueError, match=message) as caught:
        convert(run, tmp_path / "hf", config=config_of(model, tmp_path / "config"))
    assert str(tmp_path / "run") in str(caught.value) and not (tmp_path / "hf" / "config.json").exists()


def test_tensors_that_do_not_fit_are_named(ranks, tmp_path):
    model = seeing("internvit")
    config = config_of(model, tmp_path / "config")

    def run(name: str, change) -> str:
        return write(model, "internvit", ranks, tmp_path / name, change)

    with pytest.raises(ValueError, match=r"1 tensors have no place.*vision_model\.ln_post\.weight"):
        convert(
            run("post", lambda it: it.update({"vision_model.ln_post.weight": torch.ones(32)})),
            tmp_path / "a",
            config=config,
        )
    with pytest.raises(ValueError, match=r"missing: vision_model\.decoder\.layers\.1\.ls2"):
        convert(run("ls2", lambda it: it.pop("vision_model.decoder.layers.1.ls2")), tmp_path / "b", config=config)
    with pytest.raises(ValueError, match=r"vision_model\.conv1\.weight \(InternViT\) or .* is missing"):
        convert(run("conv", lambda it: it.pop("vision_model.conv1.weight")), tmp_path / "c", config=config)
    with pytest.raises(ValueError, match="number of heads of a tower of width 32 is not in the checkpoint"):
        convert(run("none", lambda it: None), tmp_path / "d")


def test_the_image_token_is_the_tokenizers(ranks, tmp_path):
    """The checkpoint has no number for <image>; --config may leave it to the tokenizer."""
    model = seeing("internvit")
    run, config = write(model, "internvit", ranks, tmp_path / "run"), config_of(model, tmp_path / "config")
    fields = json.loads((config / "config.json").read_text())
    del fields["image_token_id"]
    (config / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match="image_token_id is not in a Megatron checkpoint; give a --tokenizer that has <image>"
    ):
        convert(run, tmp_path / "hf", config=config)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert(run, tmp_path / "hf", config=config, tokenizer=tmp_path / "tokenizer")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert processor.use_tile_tags and processor.image_processor.max_tiles == 6
    inputs = processor(images=Image.new("RGB", (56, 28)), text="<image>what is this?", return_tensors="pt")
    read = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert read(**inputs).logits.isfinite().all() and len(inputs["pixel_values"]) == 3


def test_a_model_that_megatron_cannot_build(tmp_path, capsys):
    vl_model(vision_config=TOWERS["internvit"], projector_hidden_act="gelu").save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run")]) == 1
    assert "projector_hidden_act='gelu': allowed is 'relu2'" in capsys.readouterr().err
    vl_model(vision_config=TOWERS["internvit"]).save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run"), "--format", "torch", "--tp", "4"]) == 1
    assert "tp=4: allowed are divisors of" in capsys.readouterr().err
