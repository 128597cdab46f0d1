"""Cutting tensors: against the slicing table written out by hand, and by what a cut or reordered model computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import reference_logits
from tiny import prompt, tiny_config, tiny_model
from torch import Tensor
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig as NativeConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.elastic.budgets import Budget
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.model.loading import module_names
from nemotron_h_hf.slicing import cuts, everything, kept_config, runs
from nemotron_h_hf.tensors import checkpoint_tensors

DENSE = {"hidden_size": 32, "intermediate_size": (8, 40), "mamba_num_heads": (4, 8, 2), "mamba_head_dim": (4, 8, 3),
         "num_attention_heads": 2, "layers": (0, 1, 2, 3, 5, 6)}  # fmt: skip
EXPERTS = {"hidden_size": 40, "n_routed_experts": 4, "moe_intermediate_size": 16,
           "moe_shared_expert_intermediate_size": 24, "layers": (1, 2, 3, 4)}  # fmt: skip
MTP = {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"}


def released(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights in the names of checkpoint files."""
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        if name.endswith(("experts.up_proj", "experts.down_proj")):
            stem, which = name.rsplit(".", 1)
            weights |= {f"{stem}.{e}.{which}.weight": tensor[e] for e in range(len(tensor))}
        else:
            weights[name] = tensor
    return weights


def build(config: NemotronHConfig, weights: dict[str, Tensor]) -> NemotronHForCausalLM:
    model = NemotronHForCausalLM(config).eval()
    if config.tie_word_embeddings:
        weights = {**weights, "lm_head.weight": weights["backbone.embeddings.weight"]}
    model.load_state_dict(module_names(weights, model.state_dict()))
    return model


def cut(model: torch.nn.Module, budget: Budget) -> tuple[NemotronHConfig, dict[str, Tensor]]:
    child, weights = resolve(model.config, budget), released(model)
    return child.config, {each.name: each.of(weights[each.source]) for each in child.cuts()}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(prompt(2, 24), use_cache=False).logits


def by_hand(parent: NemotronHConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DENSE out of the dense parent by the slicing table: d, heads of each group, rows of in_proj one block at a time."""
    d, groups, state, dim, head_dim = 32, 2, 16, 8, 16
    small = {
        "backbone.embeddings.weight": weights["backbone.embeddings.weight"][:, :d],
        "backbone.norm_f.weight": weights["backbone.norm_f.weight"][:d],
        "lm_head.weight": weights["lm_head.weight"][:, :d],
    }
    widths, mamba = iter((8, 40)), iter(((4, 4), (8, 8), (2, 3)))
    for own, layer in enumerate((0, 1, 2, 3, 5, 6)):
        old, new = f"backbone.layers.{layer}.", f"backbone.layers.{own}."
        old_mixer, new_mixer = f"{old}mixer.", f"{new}mixer."
        small[f"{new}norm.weight"] = weights[f"{old}norm.weight"][:d]
        kind = parent.layers_block_type[layer]
        if kind == "mlp":
            f = next(widths)
            small[f"{new_mixer}up_proj.weight"] = weights[f"{old_mixer}up_proj.weight"][:f, :d]
            small[f"{new_mixer}down_proj.weight"] = weights[f"{old_mixer}down_proj.weight"][:d, :f]
        elif kind == "full_attention":
            heads = [0, 2]  # the first query head of each of two key/value heads
            rows = [head * head_dim + i for head in heads for i in range(head_dim)]
            small[f"{new_mixer}q_proj.weight"] = weights[f"{old_mixer}q_proj.weight"][rows][:, :d]
            small[f"{new_mixer}k_proj.weight"] = weights[f"{old_mixer}k_proj.weight"][:, :d]
            small[f"{new_mixer}v_proj.weight"] = weights[f"{old_mixer}v_proj.weight"][:, :d]
            small[f"{new_mixer}o_proj.weight"] = weights[f"{old_mixer}o_proj.weight"][:d][:, rows]
        else:
            heads_kept, channels = next(mamba)
            heads = [group * 4 + i for group in range(groups) for i in range(heads_kept // groups)]
            inner = [head * dim + i for head in heads for i in range(channels)]
            width, shared = 64, 2 * groups * state
            rows = [*inner, *(width + i for i in inner), *(2 * width + i for i in range(shared)),
                    *(2 * width + shared + head for head in heads)]  # fmt: skip
            conv = [*inner, *(width + i for i in range(shared))]
            small[f"{new_mixer}in_proj.weight"] = weights[f"{old_mixer}in_proj.weight"][rows][:, :d]
            for name in ("conv1d.weight", "conv1d.bias"):
                small[new_mixer + name] = weights[old_mixer + name][conv]
            for name in ("A_log", "D", "dt_bias"):
                small[new_mixer + name] = weights[old_mixer + name][heads]
            small[f"{new_mixer}norm.weight"] = weights[f"{old_mixer}norm.weight"][inner]
            small[f"{new_mixer}out_proj.weight"] = weights[f"{old_mixer}out_proj.weight"][:d][:, inner]
    return small


def test_the_slicing_table_written_out():
    model = tiny_model("dense")
    expected = by_hand(model.config, released(model))
    child, weights = cut(model, Budget(name="x", **DENSE))
    assert child.hybrid_override_pattern == "M-M*M-" and set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("shape, sizes, more", [
    ("dense", DENSE, {}), ("dense", DENSE, {"mlp_bias": True, "use_bias": True, "attention_bias": True}),
    ("dense", {"intermediate_size": 16, "hidden_size": 24}, {"tie_word_embeddings": True, "use_conv_bias": False}),
    ("list", {"layers": (0, 2, 3, 6), "mamba_head_dim": 4}, {}), ("list", {"intermediate_size": (24, 10, 1)}, {}),
    ("moe", EXPERTS, {}), ("latent", EXPERTS | {"n_routed_experts": 8}, {}), ("moe", {"n_routed_experts": 3}, MTP),
    ("attention_free", {"mamba_num_heads": (2, 6)}, {}), ("dense", {"layers": (1, 4)}, {}),
])  # fmt: skip
def test_a_cut_model_computes_what_its_tensors_say(shape, sizes, more):
    """Every tensor has its place and shape, and the model gives the float64 reference's logits on them."""
    model = tiny_model(shape, **more)
    child, weights = cut(model, Budget(name="x", **sizes))
    small = build(child, weights)
    assert {place.released: t.shape for t in checkpoint_tensors(child) for place in t.places()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }
    small.double().set_experts_implementation("eager")  # grouped matrix products have no float64
    with torch.no_grad():
        got = small(prompt(1, 12), use_cache=False).logits[0]
    expected = reference_logits(small.state_dict(), child, prompt(1, 12)[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert expected.std() > 0.3


@pytest.mark.parametrize("shape, more", [("dense", {}), ("list", {}), ("moe", {}), ("latent", MTP), ("square", {})])
def test_reordering_everything_computes_the_same(shape, more):
    """Channels of the residual stream, neurons, heads in their groups, each head's channels, experts in theirs."""
    model = tiny_model(shape, **more)
    config, generator = model.config, torch.Generator().manual_seed(0)

    def shuffled(indices: Tensor, num_groups: int = 1) -> Tensor:
        groups = indices.view(num_groups, -1)
        return torch.cat([group[torch.randperm(len(group), generator=generator)] for group in groups])

    def in_groups(heads: Tensor) -> Tensor:  # those of the last key/value head first
        return heads.view(config.num_key_value_heads, -1).flip(0).flatten()

    whole = everything(config)
    kept = replace(
        whole,
        hidden=shuffled(whole.hidden),
        neurons={i: shuffled(each) for i, each in whole.neurons.items()},
        heads={i: shuffled(each, config.n_groups) for i, each in whole.heads.items()},
        channels={i: torch.stack([shuffled(row) for row in each]) for i, each in whole.channels.items()},
        key_value_heads={i: each.flip(0) for i, each in whole.key_value_heads.items()},
        query_heads={i: shuffled(in_groups(each), config.num_key_value_heads) for i, each in whole.query_heads.items()},
        experts={i: shuffled(each, config.n_group) for i, each in whole.experts.items()},
        expert_neurons={i: torch.stack([shuffled(row) for row in each]) for i, each in whole.expert_neurons.items()},
        shared_neurons={i: shuffled(each) for i, each in whole.shared_neurons.items()},
    )
    weights = released(model)
    reordered = {each.name: each.of(weights[each.source]) for each in cuts(config, kept)}
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in reordered.items())
    difference = (logits(build(kept_config(config, kept), reordered)) - logits(model)).abs().max()
    assert difference < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 2}, {"num_key_value_heads": 2, "num_attention_heads": 2}])
def test_fewer_key_value_heads_in_transformers_own_model(sizes, tmp_path):
    """Its model with weights cut by hand: the first key/value heads, and the first query heads of each of those."""
    parent = tiny_model("dense", num_attention_heads=8, num_key_value_heads=4)
    query = [head * 16 + i for head in ([0, 1, 2, 3] if len(sizes) == 1 else [0, 2]) for i in range(16)]
    weights = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    for name, tensor in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = tensor[:32]
        elif name.endswith("q_proj.weight"):
            weights[name] = tensor[query]
        elif name.endswith("o_proj.weight"):
            weights[name] = tensor[:, query]
    expected = native(parent.config, weights, num_attention_heads=len(query) // 16, num_key_value_heads=2)
    parent.save_pretrained(tmp_path)
    small = NemotronHForCausalLM.from_pretrained(tmp_path, budget=sizes)
    assert (small.config.num_key_value_heads, small.config.num_attention_heads) == (2, len(query) // 16)
    torch.testing.assert_close(logits(small), expected(prompt(2, 24), use_cache=False).logits, rtol=0, atol=1e-5)
    assert (logits(small) - logits(parent)).abs().max() > 1e-2


@torch.no_grad()
def test_fewer_experts_per_token_in_transformers_own_model(tmp_path):
    parent = tiny_model("moe")
    parent.save_pretrained(tmp_path)
    small = NemotronHForCausalLM.from_pretrained(tmp_path, budget={"num_experts_per_tok": 2}).double()
    whole = native(parent.config, parent.state_dict(), num_experts_per_tok=2).double()
    for model in (small, whole):
        model.set_experts_implementation("eager")  # grouped matrix products have no float64
    expected = whole(prompt(2, 24), use_cache=False).logits
    torch.testing.assert_close(logits(small), expected.double(), rtol=0, atol=1e-5)
    assert (logits(small) - logits(parent)).abs().max() > 1e-2


def native(config: NemotronHConfig, weights: dict[str, Tensor], **sizes: int) -> torch.nn.Module:
    """transformers' own model of this configuration with other sizes."""
    model = NativeForCausalLM(NativeConfig(**{**config.to_dict(), **sizes})).eval()
    model.load_state_dict(weights)
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


def test_heads_of_the_wrong_group_compute_something_else():
    """The test above can fail: a head that moves to another group meets other B, C and norm."""
    model = tiny_model("dense")
    whole, weights = everything(model.config), released(model)
    swapped = {i: each[[4, 1, 2, 3, 0, 5, 6, 7]] for i, each in whole.heads.items()}
    moved = {each.name: each.of(weights[each.source]) for each in cuts(model.config, replace(whole, heads=swapped))}
    assert (logits(build(model.config, moved)) - logits(model)).abs().max() > 0.1


def test_everything_is_a_copy():
    model = tiny_model("moe")
    weights = released(model)
    for each in cuts(model.config, everything(model.config)):
        copy = each.of(weights[each.source])
        assert each.name == each.source and torch.equal(copy, weights[each.name])
        assert copy.data_ptr() != weights[each.name].data_ptr()


def test_budgets_nest():
    """A cut of a cut is the smaller cut."""
    model = tiny_model("dense")
    middle = Budget(name="m", hidden_size=40, intermediate_size=40, mamba_num_heads=6, mamba_head_dim=6)
    small = Budget(name="s", hidden_size=32, intermediate_size=24, mamba_num_heads=4, mamba_head_dim=4)
    direct = cut(model, small)[1]
    twice = cut(build(*cut(model, middle)), small)[1]
    assert all(torch.equal(tensor, twice[name]) for name, tensor in direct.items())


def test_what_is_kept_must_fit_the_configuration():
    config = tiny_config("dense")
    kept = everything(config)
    with pytest.raises(ValueError, match="would be .* from what is kept, the configuration asks for"):
        list(cuts(config, replace(kept, hidden=kept.hidden[:32]), config))


@pytest.mark.parametrize("indices, expected", [
    ([0, 1, 2], [(0, 3)]), ([0, 1, 4, 5, 9], [(0, 2), (4, 6), (9, 10)]), ([3], [(3, 4)]), ([5, 4], [(5, 6), (4, 5)]),
])  # fmt: skip
def test_runs_are_what_can_be_read_in_one_piece(indices, expected):
    assert runs(torch.tensor(indices)) == expected
