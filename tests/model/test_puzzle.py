"""The released Puzzle model's layout: a checkpoint made here by hand, name by name, and models that only it can express."""

import json
import shutil

import pytest
import torch
from puzzle_tiny import BLOCKS, LATENT, RELEASED, stacked, write_released
from reference import reference_logits
from safetensors.torch import load_file, save_file
from tiny import COMMON, EXPERTS, prompt, spread, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from nemotron_h_hf import (
    HybridCache,
    NemotronHConfig,
    NemotronHForCausalLM,
    NemotronHPuzzleConfig,
    NemotronHPuzzleForCausalLM,
)
from nemotron_h_hf.model import loading


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


def test_loads_without_remote_code_and_agrees_with_float64(released):
    config = AutoConfig.from_pretrained(released)
    assert isinstance(config, NemotronHPuzzleConfig) and config.hybrid_override_pattern == "ME*EME"
    assert config.moe_intermediate_size == [24, 16, 40, 56] and config.num_experts_per_tok == [3, 1, 5, 6]
    assert config.n_routed_experts == 8 and config.moe_latent_size == LATENT
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float64)
    assert type(model) is NemotronHPuzzleForCausalLM
    ids = prompt(1, 12)
    with torch.no_grad():
        logits = model(ids).logits[0]
        cache = HybridCache(model.config)
        steps = [model(part, past_key_values=cache).logits[0] for part in (ids[:, :7], *ids[:, 7:].split(1, 1))]
    expected = reference_logits(stacked(load_file(released / "model.safetensors")), config, ids[0])
    assert torch.allclose(logits, expected, atol=1e-9, rtol=0), (logits - expected).abs().max()
    assert torch.allclose(torch.cat(steps), expected, atol=1e-9, rtol=0)
    assert expected.std() > 0.5
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 16) and generated[0, 12] == logits[-1].argmax()


def test_saves_what_it_read(released, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(released)
    model.save_pretrained(tmp_path)
    before, after = load_file(released / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config.get(name) for name in RELEASED if name != "norm_eps"} == {
        name: value for name, value in RELEASED.items() if name != "norm_eps"
    }
    assert config["layer_norm_epsilon"] == 1e-5
    absent = ("hybrid_override_pattern", "mtp_hybrid_override_pattern", "moe_intermediate_size", "num_experts_per_tok")
    assert not [name for name in absent if name in config]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {**again.config.to_dict(), "_name_or_path": None} == {**model.config.to_dict(), "_name_or_path": None}


def test_trains_with_gradients_in_every_layer(released):
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32).train()
    ids = prompt(2, 24)
    output = model(ids, labels=ids, output_router_logits=True)
    (output.loss + output.aux_loss).backward()
    assert len(output.router_logits) == 3
    balanced = [8 * (score.sigmoid() / score.sigmoid().sum(-1, keepdim=True)).mean(0) for score in output.router_logits]
    chosen = [
        torch.zeros_like(score).scatter_(1, score.topk(k, dim=-1).indices, 1 / k).mean(0)
        for score, k in zip(output.router_logits, (3, 1, 5))
    ]
    by_hand = torch.stack([(share * chance).sum() for share, chance in zip(chosen, balanced)]).mean()
    assert torch.allclose(output.aux_loss, by_hand)
    for index, width in ((1, 24), (3, 16), (5, 40)):
        experts = model.model.layers[index].mixer.experts
        assert experts.up_proj.shape == (8, width, LATENT) and experts.up_proj.grad.abs().sum() > 0


def test_an_ordinary_model_with_lists_is_saved_as_puzzle(tmp_path, monkeypatch):
    sizes = {"n_routed_experts": [8, 4], "num_experts_per_tok": [3, 2], "moe_shared_expert_intermediate_size": [40, 16],
             "moe_latent_size": [None, 24]}  # fmt: skip
    model = spread(NemotronHForCausalLM(tiny_config("moe", **sizes))).eval()
    said: list[str] = []
    monkeypatch.setattr(loading.logger, "warning_once", said.append)
    model.save_pretrained(tmp_path)
    assert len(said) == 1 and "nemotron_h_puzzle" in said[0]
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert config["model_type"] == "nemotron_h_puzzle" and config["architectures"] == ["NemotronHPuzzleForCausalLM"]
    assert config["block_configs"][4] == {
        "block_type": "moe", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 16, "moe_latent_size": 24,
    }  # fmt: skip
    assert all(name.startswith(("model.", "lm_head.")) for name in tensors)
    assert tensors["model.layers.4.mixer.experts.3.up_proj.weight"].shape == (24, 24)
    ids = prompt(2, 13)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(back(ids).logits, logits)
        for row, one in zip(ids, logits):
            expected = reference_logits(dict(model.state_dict()), model.config, row)
            assert torch.allclose(one.double(), expected, atol=2e-4), (one - expected).abs().max()


def test_lists_that_agree_are_an_ordinary_model(tmp_path):
    model = tiny_model("moe", n_routed_experts=[8, 8], num_experts_per_tok=[3, 3], moe_intermediate_size=[24, 24])
    assert type(model.config) is NemotronHConfig and model.config.n_routed_experts == 8
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nemotron_h"
    with pytest.raises(
        ValueError, match=r"n_routed_experts=\[8, 8, 8\] has 3 entries: allowed is one per MoE layer.* 2"
    ):
        tiny_config("moe", n_routed_experts=[8, 8, 8])


# Sliding windows

WINDOWS = {"hybrid_override_pattern": "M*-*M*", "sliding_window": [5, None, 3], "dtype": torch.float64}


@pytest.fixture(scope="module")
def windowed():
    return tiny_model("dense", **WINDOWS).double()


@pytest.fixture(scope="module")
def by_loop(windowed):
    """Tokens and their logits by the loop."""
    ids = prompt(1, 13)
    return ids, reference_logits(windowed.state_dict(), windowed.config, ids[0])


@torch.no_grad()
def tiny_logits_without_windows(windowed, ids):
    """Of the last token, by the same weights."""
    plain = NemotronHForCausalLM(tiny_config("dense", hybrid_override_pattern="M*-*M*")).double().eval()
    plain.load_state_dict(windowed.state_dict())
    return plain(ids).logits[0, -1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_windows_agree_with_a_loop_however_the_text_is_fed(windowed, by_loop, implementation):
    windowed.set_attn_implementation(implementation)
    ids, expected = by_loop
    assert (expected[-1] - tiny_logits_without_windows(windowed, ids)).abs().max() > 1e-3
    parts = {"whole": [13], "steps": [4, *[1] * 9], "chunks": [4, 5, 1, 3]}
    for split in parts.values():
        for cache in [None] * (len(split) == 1) + [HybridCache(windowed.config), HybridCache(windowed.config, 16)]:
            with torch.no_grad():
                logits = [
                    windowed(part, past_key_values=cache, use_cache=cache is not None).logits[0]
                    for part in ids.split(split, 1)
                ]
            assert torch.allclose(torch.cat(logits), expected, atol=1e-9, rtol=0), (split, cache)
    windowed.set_attn_implementation("sdpa")


def test_padding_takes_no_room_in_a_window(windowed):
    ids, short = prompt(2, 14), 9
    expected = reference_logits(windowed.state_dict(), windowed.config, ids[1, :short])
    real = torch.ones(2, 14, dtype=torch.long)
    places = torch.tensor([0, 1, 4, 5, 6, 9, 10, 12, 13])  # padding in front of, between and among the last tokens
    padded, real[1] = torch.full((2, 14), 3), 0
    padded[0], padded[1, places], real[1, places] = ids[0], ids[1, :short], 1
    with torch.no_grad():
        logits = windowed(padded, attention_mask=real).logits[1, places]
        cache = HybridCache(windowed.config)
        steps = [
            windowed(padded[:, end - 2 : end], attention_mask=real[:, :end], past_key_values=cache).logits
            for end in range(2, 15, 2)
        ]
    assert torch.allclose(logits, expected, atol=1e-9, rtol=0)
    assert torch.allclose(torch.cat(steps, 1)[1, places], expected, atol=1e-9, rtol=0)


def test_packed_documents_have_their_own_windows(windowed):
    ids = prompt(1, 20)
    with torch.no_grad():
        packed = windowed(ids, seq_idx=torch.tensor([[0] * 8 + [1] * 12]), use_cache=False).logits[0]
    alone = [reference_logits(windowed.state_dict(), windowed.config, part[0]) for part in ids.split([8, 12], 1)]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-9, rtol=0)


def test_generates_with_windows(windowed):
    ids, more = prompt(1, 9), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    text = windowed.generate(ids, cache_implementation="dynamic", **more)
    logits = reference_logits(windowed.state_dict(), windowed.config, text[0, :-1])
    assert torch.equal(text[0, 9:], logits[8:].argmax(-1))
    assert torch.equal(windowed.generate(ids, cache_implementation="static", **more), text)


def test_windows_roll_back_and_are_saved(windowed, tmp_path):
    ids, cache = prompt(1, 16), HybridCache(windowed.config)
    with torch.no_grad():
        whole = windowed(ids).logits
        windowed(ids[:, :10], past_key_values=cache)
        cache.activate_past_recording()
        windowed(prompt(1, 4, seed=9), past_key_values=cache)
        cache.crop(-4)
        assert torch.allclose(windowed(ids[:, 10:], past_key_values=cache).logits, whole[:, 10:], atol=1e-9)
    windowed.save_pretrained(tmp_path)
    blocks = json.loads((tmp_path / "config.json").read_text())["block_configs"]
    assert [block.get("sliding_window") for block in blocks] == [None, 5, None, None, None, 3]
    assert blocks[2] == {"block_type": "mlp", "intermediate_size": 80} and blocks[3] == {"block_type": "attention"}
    assert AutoConfig.from_pretrained(tmp_path).sliding_window == [5, None, 3]


@pytest.mark.parametrize("field, value", [("sliding_window", 4), ("num_experts_per_tok", [2, 1])])
def test_sizes_that_are_set_later_are_saved(field, value, tmp_path):
    config = tiny_model("moe").config
    kinds = config.layers_block_type.count("moe")
    setattr(config, field, value if field == "sliding_window" else (value * kinds)[:kinds])
    NemotronHForCausalLM(config).save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), field) == getattr(config, field)


def test_one_window_for_all_and_gradients():
    model = tiny_model("dense", sliding_window=4).double()
    ids = prompt(2, 12)
    model(ids, labels=ids).loss.backward()
    got = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("eager")
    model(ids, labels=ids).loss.backward()
    assert all(torch.allclose(got[name], weight.grad, atol=1e-10) for name, weight in model.named_parameters())


# Bad input

BAD = [
    (("block_configs", 1, "moe_intermediate_size"), None, r"block_configs\[1\] has no moe_intermediate_size"),
    (("block_configs", 1, "num_experts_per_tok"), 9, "num_experts_per_tok=9 in layer 1: allowed is at most n_routed_experts=8"),
    (("block_configs", 3, "num_experts_per_tok"), 0, r"block_configs\[3\].num_experts_per_tok=0: allowed is a positive integer"),
    (("block_configs", 3, "moe_intermediate_size"), "16", r"block_configs\[3\].moe_intermediate_size='16': allowed"),
    (("block_configs", 2, "sliding_window"), -1, r"block_configs\[2\].sliding_window=-1: allowed is a positive integer"),
    (("block_configs", 0, "block_type"), "conv", r"block_configs\[0\]=.*allowed is a block_type of mamba, attention, mlp, moe"),
    (("block_configs", 0, "block_type"), "attention", r"layers_block_type=.*allowed is what block_configs says"),
    (("block_configs", 2, "num_experts_per_tok"), 3, r"block_configs\[2\].num_experts_per_tok=3: allowed in a block of type att"),
    (("block_configs",), BLOCKS[:-1], "layers_block_type=.*allowed is what block_configs says"),
    (("block_configs",), [], r"block_configs=\[\]: allowed is a list with a block for each layer"),
    (("block_configs", 4), "mamba", r"block_configs\[4\]='mamba': allowed"),
    (("mtp_block_configs",), [], r"mtp_block_configs=\[\]: allowed is a list with a block for each layer"),
    (("mtp_block_configs", 1, "num_experts_per_tok"), 9, "num_experts_per_tok=9 in layer 7: allowed is at most"),
    (("n_routed_experts",), None, r"block_configs\[1\] has no n_routed_experts, and neither has the top level"),
    (("layers_block_type", 5), ["moe"], "layers_block_type=.*allowed is what block_configs says"),
    (("mtp_layers_block_type", 1), {}, "mtp_layers_block_type=.*allowed is what mtp_block_configs says"),
    (("block_configs", 0, "ssm_state_size"), 8, r"ssm_state_size=\[8, 12\].*allowed is one value for all of them"),
    (("num_hidden_layers",), 5, "num_hidden_layers=5 does not match layers_block_type"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "message"), BAD, ids=[".".join(map(str, place)) for place, _, _ in BAD])
def test_bad_blocks_are_named(released, tmp_path, place, value, message):
    config = json.loads(json.dumps(RELEASED))
    target = config
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    shutil.copytree(released, tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"moe_intermediate_size": 32},
            r"model.layers.1.mixer.experts.\w+_proj in shape .*24.*its config asks for .*32",
        ),
        ({"block_type": "mamba"}, "lacks .* tensors that its config asks for: model.layers.1.mixer"),
    ],
)
def test_blocks_that_contradict_the_tensors(released, tmp_path, change, message):
    config = json.loads(json.dumps(RELEASED))
    config["block_configs"][1] = {**({} if "block_type" in change else BLOCKS[1]), **change}
    config.pop("layers_block_type")
    shutil.copytree(released, tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


def test_a_layer_without_its_experts(released, tmp_path):
    tensors = load_file(released / "model.safetensors")
    shutil.copytree(released, tmp_path / "bad")
    kept = {name: it for name, it in tensors.items() if not name.startswith("model.layers.3.mixer.experts.")}
    save_file(kept, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 tensors that its config asks for: model.layers.3.mixer.experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


def test_saved_experts_load_into_a_model(released, tmp_path):
    """As transformers' Trainer resumes: by `load_state_dict` of the saved file."""
    model = AutoModelForCausalLM.from_pretrained(released)
    model.save_pretrained(tmp_path)
    fresh = NemotronHPuzzleForCausalLM(model.config)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(it, fresh.state_dict()[name].to(it)) for name, it in model.state_dict().items())


def test_fields_given_when_loading_replace_those_of_the_blocks(released):
    config = AutoConfig.from_pretrained(released, num_experts_per_tok=2)
    assert config.num_experts_per_tok == 2 and config.moe_intermediate_size == [24, 16, 40, 56]
    assert config.to_dict()["block_configs"][1] == {**BLOCKS[1], "num_experts_per_tok": 2}
    assert {**COMMON, **EXPERTS}["n_routed_experts"] == 8


def test_without_multi_token_prediction_in_the_files(released, tmp_path):
    shutil.copytree(released, tmp_path / "bare")
    tensors = load_file(released / "model.safetensors")
    tensors = {name: it for name, it in tensors.items() if not name.startswith("mtp.")}
    save_file(tensors, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert model.config.num_nextn_predict_layers == 0 and model.config.moe_intermediate_size == [24, 16, 40]
    model.save_pretrained(tmp_path / "again")
    assert "mtp_block_configs" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert F.softmax(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(prompt()).logits, -1).isfinite().all()
