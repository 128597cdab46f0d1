"""The table of tensors and axes, against the modules of transformers' own model, which know nothing of it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from tiny import tiny_config
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig as NativeConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM
from nemotron_h_hf.compression.importance import Importance
from nemotron_h_hf.elastic.budgets import FIELDS_OF_KIND, Budget
from nemotron_h_hf.elastic.masks import Masks
from nemotron_h_hf.model.configuration_nemotron_h import NemotronHPuzzleConfig
from nemotron_h_hf.model.weights import FLOAT32
from nemotron_h_hf.slicing import Kept
from nemotron_h_hf.tensors import AXES, checkpoint_tensors, fields_of, kind_of, sizes, together

# transformers has no biases in attention; test_cost.py counts ours
BIASES = {"use_bias": True, "mlp_bias": True, "use_conv_bias": False}
KINDS = [("dense", {}), ("moe", {}), ("latent", {}), ("dense", BIASES), ("latent", BIASES)]
SMALLER = {
    "hidden_size": 32, "intermediate_size": 40, "mamba_num_heads": 4, "mamba_head_dim": 4, "num_key_value_heads": 1,
    "num_attention_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip


def native_shapes(config: NemotronHConfig, **changed: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = NativeForCausalLM(NativeConfig(**{**config.to_dict(), **changed}))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shapes_of_table(config: NemotronHConfig) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for tensor in checkpoint_tensors(config):
        stacked = (tensor.copies,) if "{e}" in tensor.name else ()
        shapes[tensor.place.module] = (*stacked, *tensor.shape)
    return shapes


@pytest.mark.parametrize(("shape", "more"), KINDS)
def test_names_and_shapes_are_those_of_transformers_own_model(shape, more):
    config = tiny_config(shape, **more)
    assert shapes_of_table(config) == native_shapes(config)


def test_sizes_may_differ_by_layer():
    """Which transformers' own model does not know: against our modules."""
    experts = {"n_routed_experts": [8, 4], "moe_intermediate_size": [24, 16], "moe_latent_size": [None, 32]}
    config = NemotronHPuzzleConfig(**{**tiny_config("moe").to_dict(), **experts, "mamba_num_heads": [8, 4, 8]})
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    assert shapes_of_table(config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
@pytest.mark.parametrize(("shape", "more"), KINDS[:1] + KINDS[3:])
def test_an_axis_is_where_its_letters_are(axis, shape, more):
    """With another size, exactly the dimensions change whose letters have the field."""
    config = tiny_config(shape, **more)
    whole, small = native_shapes(config), native_shapes(config, **{axis.field: SMALLER[axis.field]})
    for tensor in checkpoint_tensors(config):
        words = (["e"] if "{e}" in tensor.name else []) + tensor.row.shape.split()
        expected = [
            any(axis.field in fields_of(config, letter, tensor.layer) for letter in word.split("+")) for word in words
        ]
        before, after = whole[tensor.place.module], small[tensor.place.module]
        assert [one != other for one, other in zip(before, after, strict=True)] == expected, tensor.name


def test_what_stays_float32_is_what_the_model_keeps():
    model = NemotronHForCausalLM(tiny_config("moe")).to(torch.bfloat16)
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {t.place.module for t in checkpoint_tensors(model.config) if t.in_float32} != set()
    assert all(name.endswith(FLOAT32) for name in kept)


def test_layers_past_the_stack_are_those_of_multi_token_prediction():
    pattern = {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*-"}
    config = tiny_config("list", **pattern)
    found = [tensor for tensor in checkpoint_tensors(config) if tensor.kind == "mtp"]
    assert {tensor.place.layer for tensor in found} == {0, 1, 2, 3}
    assert {tensor.layer for tensor in found} == {7, 8} and {tensor.stack_layer for tensor in found} == {None}
    assert [kind_of(config, layer) for layer in (6, 7, 8)] == ["mlp", "full_attention", "mlp"]
    assert [sizes(config, layer)["f"] for layer in (1, 4, 6, 8)] == [24, 80, 8, 80]


def test_all_that_is_kept_by_axis_has_the_axes_of_the_table():
    names = [axis.name for axis in AXES]
    assert [field.name for field in fields(Kept)] == ["layers", *names]
    assert [field.name for field in fields(Importance)] == [name for name in names if name != "key_value_heads"]
    masked = [field.name for field in fields(Masks) if field.name not in ("layers", "experts_per_token")]
    assert masked == [name for name in names if name not in ("heads", "key_value_heads")]
    assert {axis.field for axis in AXES} < {field.name for field in fields(Budget)}
    per_layer = NemotronHConfig.PER_LAYER_FIELDS
    assert all(axis.kind == per_layer[axis.field] for axis in AXES if axis.field in per_layer)
    assert sorted(FIELDS_OF_KIND) == sorted({axis.kind for axis in AXES if axis.kind})


def test_axes_that_are_ordered_together():
    """Against the table as it was written out by hand."""
    heads, queries, experts = ["heads", "channels"], ["key_value_heads", "query_heads"], ["experts", "expert_neurons"]
    expected = {"hidden_size": ["hidden"], "intermediate_size": ["neurons"], "mamba_num_heads": heads, "mamba_head_dim": heads,
                "num_key_value_heads": queries, "num_attention_heads": queries, "n_routed_experts": experts,
                "moe_intermediate_size": experts, "moe_shared_expert_intermediate_size": ["shared_neurons"]}  # fmt: skip
    assert {axis.field: [one.name for one in together(axis.field)] for axis in AXES} == expected
