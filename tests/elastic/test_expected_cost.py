"""Expected costs: at one-hot choices those of the resolved configuration, between them the mean; the router's loss; latency."""

import itertools
import json

import pytest
import torch
from test_router import CHOICES, EXPERTS, LATENT, ORDER
from tiny import tiny_config

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.cost import cache_bytes, num_parameters, weight_bytes
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.elastic.train.choices import axes_of, budget_of, full, one_hot
from nemotron_h_hf.elastic.train.expected_cost import ExpectedCost, router_loss
from nemotron_h_hf.elastic.train.latency import measure_latency

MTP = {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"}


def random_indices(axes, count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield {a.field: torch.randint(a.num_choices, (a.num_rows,), generator=generator).tolist() for a in axes}


@pytest.mark.parametrize("shape, choices, per_layer, more", [
    ("dense", CHOICES, (), {}), ("dense", CHOICES, ("intermediate_size", "mamba_num_heads", "num_attention_heads"), {}),
    ("list", {"intermediate_size": [40, 24], "layers": [5]}, ("intermediate_size",), {}),
    ("moe", EXPERTS, (), {"tie_word_embeddings": True}), ("latent", LATENT, (), {}), ("moe", EXPERTS, (), MTP),
    ("dense", CHOICES, (), {"use_bias": True, "mlp_bias": True, "attention_bias": True}),
])  # fmt: skip
def test_one_hot_choices_cost_what_their_configuration_costs(shape, choices, per_layer, more):
    config = tiny_config(shape, **more)
    axes = axes_of(config, choices, per_layer)
    parameters = ExpectedCost(config, axes, layer_order=ORDER)
    memory = ExpectedCost(config, axes, "memory", ORDER, context_tokens=1000, batch_size=3)
    assert parameters.full == num_parameters(config)
    for indices in random_indices(axes, 20):
        small = resolve(config, budget_of(config, axes, indices, "small", ORDER)).config
        chosen = one_hot(axes, indices)
        assert float(parameters(chosen)) == num_parameters(small)
        assert float(memory(chosen)) == weight_bytes(small) + 3 * cache_bytes(small, 1000)


def test_of_the_12b_exactly():
    config = NemotronHConfig.from_preset("nano-12b-v2")
    axes = axes_of(config, {"hidden_size": [4096, 3584], "intermediate_size": [16384, 12288], "mamba_num_heads": [96]})
    cost = ExpectedCost(config, axes)
    assert float(cost(one_hot(axes, {"hidden_size": [2], "intermediate_size": [2], "mamba_num_heads": [1]}))) == (
        num_parameters(NemotronHConfig.from_preset(
            "nano-12b-v2", hidden_size=3584, intermediate_size=12288, mamba_num_heads=96))
    )  # fmt: skip


def test_between_choices_it_is_the_mean_over_them_and_differentiable():
    config = tiny_config()
    axes = axes_of(config, {"hidden_size": [32], "intermediate_size": [48, 16], "layers": [5]})
    torch.manual_seed(0)
    soft = {a.field: torch.rand(a.num_rows, a.num_choices).double().softmax(-1).requires_grad_() for a in axes}
    cost = ExpectedCost(config, axes, layer_order=ORDER)
    expected = 0.0
    for picks in itertools.product(*(range(a.num_choices) for a in axes)):
        indices = {axis.field: [pick] for axis, pick in zip(axes, picks)}
        share = torch.stack([soft[field][0, pick] for field, [pick] in indices.items()]).prod()
        expected = expected + share * float(cost(one_hot(axes, indices)))
    found = cost(soft)
    torch.testing.assert_close(found, expected)
    found_gradients, gradients = (torch.autograd.grad(value, list(soft.values())) for value in (found, expected))
    for one, other in zip(found_gradients, gradients):
        # Rows sum to 1: along them it does not matter
        torch.testing.assert_close(one - one.mean(), other - other.mean())


def test_loss_has_a_dead_zone_and_pins_the_whole_model():
    axes = axes_of(tiny_config(), {"hidden_size": [32], "intermediate_size": [48, 16]})

    def loss(cost, target, chosen=None):
        cost = torch.tensor(float(cost), dtype=torch.float64, requires_grad=True)
        found = router_loss(cost, target, 100.0, full(axes) if chosen is None else chosen, axes)
        return found.item(), torch.autograd.grad(found, cost)[0].item()

    assert loss(52, 50) == (0, 0) and loss(48, 50) == (0, 0)
    assert loss(60, 50) == pytest.approx((0.2, 0.02)) and loss(40, 50) == pytest.approx((0.2, -0.02))
    assert loss(97, 100) == pytest.approx((0.03, -0.01))  # no dead zone for the whole
    smallest = one_hot(axes, {"hidden_size": [1], "intermediate_size": [2]})
    assert loss(100, 100, smallest)[0] == pytest.approx(10 * (1 + 2 / 3))
    assert loss(50, 50, smallest)[0] == 0


@pytest.mark.parametrize("shape, choices, per_layer", [
    ("dense", CHOICES, ("intermediate_size", "mamba_num_heads")), ("moe", {"hidden_size": [32], "n_routed_experts": [4]}, ()),
])  # fmt: skip
def test_latency_is_the_sum_over_layers_of_the_table(shape, choices, per_layer):
    config = tiny_config(shape)
    axes = axes_of(config, choices, per_layer)
    order = ORDER[: config.num_hidden_layers] if shape == "dense" else range(config.num_hidden_layers)
    table = json.loads(json.dumps(measure_latency(config, axes, sequence_length=8, repeats=1)))
    cost = ExpectedCost(config, axes, "latency", order, latency=table)
    own = {"linear_attention": ("mamba_num_heads", "mamba_head_dim"),
           "full_attention": ("num_key_value_heads", "num_attention_heads")[0 if "num_key_value_heads" in choices else 1 :],
           "mlp": ("intermediate_size",),
           "moe": ("n_routed_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size")}  # fmt: skip
    for indices in random_indices(axes, 20):
        budget = budget_of(config, axes, indices, "small", order)
        width = indices["hidden_size"][0]
        expected = table["seconds"]["outside"][width]
        for layer in range(config.num_hidden_layers) if budget.layers is None else budget.layers:
            kind = config.layers_block_type[layer]
            entry = table["seconds"][kind][width]
            for field in own[kind]:
                axis = next((axis for axis in axes if axis.field == field), None)
                entry = entry[indices[field][axis.layers.index(layer) if axis.per_layer else 0] if axis else 0]
            expected += entry
        assert float(cost(one_hot(axes, indices))) == pytest.approx(expected)
    assert 0 < cost.full < 5


def test_what_cannot_be_costed_is_refused():
    config = tiny_config()
    axes = axes_of(config, {"hidden_size": [32]})
    with pytest.raises(ValueError, match="metric='flops': allowed are parameters, memory, latency"):
        ExpectedCost(config, axes, "flops")
    with pytest.raises(ValueError, match="measure_latency makes one"):
        ExpectedCost(config, axes, "latency")
    table = measure_latency(config, axes, sequence_length=8, repeats=1)
    with pytest.raises(ValueError, match="measured for choices"):
        ExpectedCost(config, axes_of(config, {"hidden_size": [16]}), "latency", latency=table)
