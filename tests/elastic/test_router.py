"""The router: its schedules, noise and mixtures; axes into masks and budgets, against the masks of the budgets themselves."""

import itertools
import math

import pytest
import torch
from tiny import tiny_config

from nemotron_h_hf.elastic.masks import Masks, child_masks
from nemotron_h_hf.elastic.resolve import resolve
from nemotron_h_hf.elastic.train.choices import (
    DEPTH,
    axes_of,
    budget_of,
    full,
    kept_layers,
    masks_of,
    one_hot,
    prefixes,
)
from nemotron_h_hf.elastic.train.router import (
    Router,
    RouterSettings,
    argmax_indices,
    budget_vector,
    choose,
    generator_of,
    gumbel_noise,
)

CHOICES = {
    "hidden_size": [48, 32], "intermediate_size": [80, 48, 16], "mamba_num_heads": [8, 4], "mamba_head_dim": [8, 5],
    "num_attention_heads": [4, 2], "num_key_value_heads": [1], "layers": [7, 6, 4],
}  # fmt: skip
EXPERTS = {"hidden_size": [32], "n_routed_experts": [4], "moe_intermediate_size": [8], "mamba_num_heads": [4],
           "moe_shared_expert_intermediate_size": [24, 16]}  # fmt: skip
LATENT = {**EXPERTS, "n_routed_experts": [8]}  # two in each of its groups are the least
ORDER = [3, 6, 1, 0, 2, 5, 4]


def assert_same_masks(made: Masks, expected: Masks, config, layers) -> None:
    """A mask that is absent is one of ones; those of layers that do not run do not matter."""
    assert torch.equal(*(torch.ones(config.hidden_size) if m.hidden is None else m.hidden for m in (made, expected)))
    assert torch.equal(
        *(torch.ones(config.num_hidden_layers) if m.layers is None else m.layers for m in (made, expected))
    )
    for name in ("neurons", "channels", "query_heads", "experts", "expert_neurons", "shared_neurons"):
        left, right = getattr(made, name), getattr(expected, name)
        for layer in {*left, *right} & set(layers):
            one = torch.ones_like(left.get(layer, right.get(layer)))
            assert torch.equal(left.get(layer, one), right.get(layer, one)), (name, layer)


@pytest.mark.parametrize("shape, choices, per_layer", [
    ("dense", CHOICES, ()), ("dense", CHOICES, ("intermediate_size", "mamba_num_heads")),
    ("list", {"intermediate_size": [40, 24], "layers": [5]}, ("intermediate_size",)),
    ("list", {"intermediate_size": [40, 24], "layers": [5]}, ()), ("moe", EXPERTS, ()), ("latent", LATENT, ()),
])  # fmt: skip
def test_hard_choices_are_the_masks_of_their_budget(shape, choices, per_layer):
    config = tiny_config(shape)
    axes = axes_of(config, choices, per_layer)
    order = (
        ORDER[: config.num_hidden_layers] if config.num_hidden_layers == 7 else list(range(config.num_hidden_layers))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        indices = {
            axis.field: torch.randint(axis.num_choices, (axis.num_rows,), generator=generator).tolist() for axis in axes
        }
        budget = budget_of(config, axes, indices, "small", order)
        masks = masks_of(config, axes, one_hot(axes, indices), order)
        layers = range(config.num_hidden_layers) if budget.layers is None else budget.layers
        assert_same_masks(masks, child_masks(resolve(config, budget)), config, layers)


def test_the_full_choice_is_the_parent_and_says_nothing():
    config = tiny_config("list")
    axes = axes_of(config, {"intermediate_size": [40, 24], "hidden_size": [32], "layers": [5]}, ["intermediate_size"])
    indices = {field: chosen.argmax(-1).tolist() for field, chosen in full(axes).items()}
    assert budget_of(config, axes, indices, "all", ORDER).to_dict() == {"trained": False}


def test_soft_masks_are_the_mean_of_prefixes_and_differentiable():
    assert prefixes([8, 4], 2).tolist() == [[1] * 8, [1, 1, 0, 0] * 2]
    assert kept_layers([4, 3, 1], [2, 0, 3, 1]).tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 0, 0]]
    config = tiny_config()
    axes = axes_of(config, CHOICES)
    soft = {axis.field: torch.rand(axis.num_rows, axis.num_choices).softmax(-1).requires_grad_() for axis in axes}
    masks = masks_of(config, axes, soft, ORDER)
    p = soft["intermediate_size"][0]
    expected = [p.sum().item()] * 16 + [p[:2].sum().item()] * 32 + [p[0].item()] * 32
    torch.testing.assert_close(masks.neurons[1], torch.tensor(expected))
    heads, channels = soft["mamba_num_heads"][0], soft["mamba_head_dim"][0]
    torch.testing.assert_close(masks.channels[0][3, 6], heads[0] * channels[0])  # the last head of the first group
    torch.testing.assert_close(masks.layers[ORDER[0]], soft[DEPTH][0, 0])
    sum(
        m.sum() for m in (masks.hidden, masks.layers, masks.neurons[1], masks.channels[0], masks.query_heads[3])
    ).backward()
    assert all(probabilities.grad.abs().sum() > 0 for probabilities in soft.values())


@pytest.mark.parametrize("choices, per_layer, message", [
    ({"width": [4]}, (), "choices='width'"),
    ({"hidden_size": [32]}, ("hidden_size",), "per_layer='hidden_size'"),
    ({"mamba_num_heads": [3]}, (), "a multiple of 2"),
    ({"hidden_size": [64]}, (), "at most the parent's 48"),
    ({"n_routed_experts": [4]}, (), "no moe layer"),
    ({"hidden_size": []}, (), "positive integers"), ({"num_experts_per_tok": [1]}, (), "choices='num_experts_per_tok'"),
])  # fmt: skip
def test_choices_that_do_not_fit_are_refused(choices, per_layer, message):
    with pytest.raises(ValueError, match=message):
        axes_of(tiny_config(), choices, per_layer)


def test_logits_are_the_formula_of_the_paper():
    axes = axes_of(tiny_config(), CHOICES, ["intermediate_size"])
    router = Router(axes, 3)
    u = torch.tensor([0.0, 0.25, 0.75])
    logits = router(u)
    assert {field: tuple(z.shape) for field, z in logits.items()} == {
        "hidden_size": (1, 2), "intermediate_size": (3, 3), "mamba_num_heads": (1, 2), "mamba_head_dim": (1, 2),
        "num_key_value_heads": (1, 2), "num_attention_heads": (1, 2), "layers": (1, 3),
    }  # fmt: skip
    first, _, last = router.networks["intermediate_size"]
    assert first.weight.shape == (256, 3) and first.weight.std().item() == pytest.approx(0.1, rel=0.2)
    h = first.weight @ u + first.bias
    h = h.where(h > 0, 0.1 * h)
    torch.testing.assert_close(logits["intermediate_size"].flatten(), last.weight @ h + last.bias)
    normal = Router(axes, 3, RouterSettings(normalize_logits=True))(u)
    assert all(z.std().item() == pytest.approx(1.0, abs=1e-5) for z in normal.values())


def test_temperature_and_scale_run_from_first_to_last():
    settings = RouterSettings()
    assert [settings.temperature_at(p) for p in (0, 1)] == pytest.approx([1.0, 0.05])
    assert settings.temperature_at(0.5) == pytest.approx(math.sqrt(0.05))
    assert [settings.logit_scale_at(p) for p in (0, 0.5, 1)] == [1.0, 5.5, 10.0]
    with pytest.raises(ValueError, match="temperature"):
        RouterSettings(temperature=(1.0, 0.0))
    with pytest.raises(ValueError, match="hard_share"):
        RouterSettings(hard_share=2)


def test_gumbel_samples_follow_the_softmax():
    """With noise and a low temperature, how often a choice wins is its probability: the Gumbel-max theorem."""
    axes = axes_of(tiny_config(), {"intermediate_size": [80, 48, 16]})
    z = torch.tensor([[0.5, 1.0, -0.5]])
    wins = torch.zeros(3)
    for number in range(2000):
        noise = gumbel_noise(axes, generator_of(0, number, 0))
        wins[choose({"intermediate_size": z}, 2.0, 0.05, noise)["intermediate_size"].argmax()] += 1
    torch.testing.assert_close(wins / 2000, (2 * z).softmax(-1)[0], atol=0.04, rtol=0)


def test_hard_choices_are_one_hot_with_the_soft_gradient():
    z = torch.tensor([[0.5, 1.0, -0.5]], requires_grad=True)
    weights = torch.tensor([1.0, 3.0, -2.0])
    hard = choose({"f": z}, 2.0, 0.7, hard=True)["f"]
    assert hard.tolist() == [[0, 1, 0]] and argmax_indices({"f": z}) == {"f": [1]}
    (gradient,) = torch.autograd.grad((hard * weights).sum(), z)
    (expected,) = torch.autograd.grad(((2.0 * z / 0.7).softmax(-1) * weights).sum(), z)
    torch.testing.assert_close(gradient, expected)


def test_randomness_depends_on_seed_step_and_micro_step_alone():
    drawn = {numbers: torch.rand(1, generator=generator_of(*numbers)).item() for numbers in
             itertools.product(range(3), range(3), range(3))}  # fmt: skip
    assert len(set(drawn.values())) == 27
    torch.manual_seed(5)
    assert torch.rand(1, generator=generator_of(1, 2, 0)).item() == drawn[1, 2, 0]


def test_unseen_budgets_are_mixtures_of_their_neighbours():
    targets = [1.0, 0.5, 0.75]
    assert budget_vector(targets, 0.75).tolist() == [0, 0, 1]
    assert budget_vector(targets, 0.6).tolist() == pytest.approx([0, 0.6, 0.4])
    assert budget_vector(targets, 0.9).tolist() == pytest.approx([0.6, 0, 0.4])
    for target in (0.4, 1.1):
        with pytest.raises(ValueError, match=f"budget={target}: allowed is 0.5 to 1"):
            budget_vector(targets, target)
