"""Masked forwards against the models that `cuts` makes of the same weights, for every axis alone and all together."""

import pytest
import torch
from tiny import native_twin, prompt, tiny_model
from torch import nn

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.elastic.budgets import Budget
from nemotron_h_hf.elastic.masks import Masks, attach_masks, child_masks
from nemotron_h_hf.elastic.resolve import resolve

DENSE = {
    "hidden": {"hidden_size": 36},
    "neurons": {"intermediate_size": 52},
    "neurons of each layer": {"intermediate_size": (20, 80, 8)},
    "heads": {"mamba_num_heads": 4},
    "heads of each layer": {"mamba_num_heads": (8, 2, 6)},
    "head channels": {"mamba_head_dim": 5},
    "head channels of each layer": {"mamba_head_dim": (8, 3, 5)},
    "query heads": {"num_attention_heads": 2},
    "key/value heads": {"num_key_value_heads": 1},
    "key/value and query heads": {"num_key_value_heads": 1, "num_attention_heads": 1},
    "depth": {"layers": (0, 1, 2, 3, 5)},
    "no attention": {"layers": (0, 1, 2, 4, 5, 6)},
    "all": {
        "hidden_size": 40, "intermediate_size": (52, 30), "mamba_num_heads": (6, 4), "mamba_head_dim": (8, 3),
        "num_attention_heads": 2, "layers": (0, 1, 3, 4, 5),
    },
}  # fmt: skip
LIST = {
    "neurons": {"intermediate_size": (16, 40, 8)},
    "all": {**DENSE["all"], "intermediate_size": (20, 8), "layers": (0, 1, 2, 3, 6)},
}
EXPERTS = {
    "hidden": {"hidden_size": 36},
    "experts": {"n_routed_experts": 4},
    "experts per token": {"num_experts_per_tok": 2},
    "experts, and fewer per token": {"n_routed_experts": 2, "num_experts_per_tok": 1},
    "expert neurons": {"moe_intermediate_size": 16},
    "shared neurons": {"moe_shared_expert_intermediate_size": 24},
    "depth": {"layers": (0, 1, 2, 3, 5)},
    "all": {
        "hidden_size": 36, "n_routed_experts": 4, "moe_intermediate_size": 16, "mamba_num_heads": 6, "mamba_head_dim": 5,
        "moe_shared_expert_intermediate_size": 24, "num_attention_heads": 2, "layers": (1, 2, 3, 4, 5),
    },
}  # fmt: skip
LATENT = {
    **EXPERTS,
    "experts": {"n_routed_experts": 8},
    "experts, and fewer per token": {"n_routed_experts": 8, "num_experts_per_tok": 1},
    "all": {**EXPERTS["all"], "n_routed_experts": 8},
}
SMALL = {"dense": DENSE, "list": LIST, "moe": EXPERTS, "latent": LATENT}
BIASED = {"use_bias": True, "mlp_bias": True, "attention_bias": True}
WIDE_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
CASES = [(shape, axis) for shape, axes in SMALL.items() for axis in axes]


def parent_of(shape: str, **overrides) -> nn.Module:
    """With biases everywhere, and norms whose eps is large enough to matter."""
    overrides |= WIDE_GROUPS if shape == "latent" else {}
    return tiny_model(shape, layer_norm_epsilon=0.05, **{**BIASED, **overrides})


def cut_out(parent: nn.Module, budget: Budget) -> nn.Module:
    """The small model of a budget, by slicing the parent's tensors as they are saved."""
    child, stored = resolve(parent.config, budget), saved_tensors(parent)
    tensors = {cut.name: cut.of(stored[cut.source]) for cut in child.cuts()}
    model = NemotronHForCausalLM(child.config).eval()
    model.load_state_dict(tensors)
    return model


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights in the names of checkpoint files, one tensor per expert."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        if ".mixer.experts." in name:
            left, right = name.split(".experts.")
            tensors |= {f"{left}.experts.{e}.{right}.weight": row for e, row in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("shape, axis", CASES)
def test_hard_masks_compute_what_the_slice_computes(shape, axis):
    parent, budget = parent_of(shape), Budget(name="small", **SMALL[shape][axis])
    ids = prompt(2, 19)
    whole, expected = parent(ids).logits, cut_out(parent, budget)(ids).logits
    masked = attach_masks(parent)
    masked.masks = child_masks(resolve(parent.config, budget))
    torch.testing.assert_close(parent(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
    assert (whole - expected).abs().max() > 1e-2
    masked.masks = None
    assert torch.equal(parent(ids).logits, whole)
    masked.remove()
    assert torch.equal(parent(ids).logits, whole)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["dense", "list", "moe", "latent"])
def test_hard_masks_compute_what_transformers_own_model_computes_from_the_slice(shape):
    sizes = {**SMALL[shape]["all"], "mamba_num_heads": 6, "mamba_head_dim": 5}
    parent, budget = parent_of(shape, attention_bias=False), Budget(name="small", **sizes)  # native drops it
    expected = native_twin(cut_out(parent, budget))(prompt(2, 19)).logits
    attach_masks(parent).masks = child_masks(resolve(parent.config, budget))
    torch.testing.assert_close(parent(prompt(2, 19)).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layers", [(0, 1, 2, 4, 5, 6), (1, 3, 4, 6), (0, 1, 4)], ids=str)
def test_a_cache_and_prompts_in_parts_are_right_when_layers_are_bypassed(layers):
    """(0, 1, 4) has no attention, (1, 3, 4, 6) no Mamba: where the count of cached tokens comes from is not run."""
    parent, budget = parent_of("dense"), Budget(name="shallow", layers=layers)
    ids = prompt(1, 300)
    expected = cut_out(parent, budget)(ids).logits
    attach_masks(parent).masks = child_masks(resolve(parent.config, budget))
    first = parent(ids[:, :21], use_cache=True)
    second = parent(ids[:, 21:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, rtol=0, atol=2e-5)
    parent.model.tokens_per_pass = {"cpu": 100}  # 256 at a time, the least
    torch.testing.assert_close(parent(ids).logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_bypassed_layer_is_not_run():
    parent = parent_of("dense")
    runs = []
    for block in parent.model.layers:
        block.mixer.register_forward_pre_hook(lambda mixer, _: runs.append(mixer))
    attach_masks(parent).masks = Masks(layers=torch.tensor([1.0, 0, 1, 0, 0.5, 1, 0]))
    parent(prompt())
    assert runs == [parent.model.layers[index].mixer for index in (0, 2, 4, 5)]


@torch.no_grad()
def test_soft_layers_add_a_share_of_the_mixer():
    parent = parent_of("dense")
    stream = parent(prompt(), output_hidden_states=True, use_cache=False).hidden_states
    for share in (torch.tensor(0.3), torch.tensor(0.3, requires_grad=True)):
        for index in (0, 1, 3):  # Mamba, MLP, attention
            layers = torch.ones(7).index_put((torch.tensor(index),), share)
            masked = attach_masks(parent)
            masked.masks = Masks(layers=layers)
            found = parent(prompt(), output_hidden_states=True, use_cache=False).hidden_states[index + 1]
            masked.remove()
            torch.testing.assert_close(found, stream[index] + 0.3 * (stream[index + 1] - stream[index]))


@torch.no_grad()
def test_soft_hidden_mask_is_a_weighted_mean_in_the_norm():
    """In float64: the mean of squares that divides is over m rather than over a count of channels."""
    parent = parent_of("dense").double()
    m, norm = torch.rand(48, dtype=torch.float64), parent.model.layers[0].norm
    x = parent.model.embeddings(prompt())
    expected = x * m / ((x * m).square().sum(-1, keepdim=True) / m.sum() + 0.05).sqrt() * norm.weight
    seen = []
    parent.model.layers[0].mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attach_masks(parent).masks = Masks(hidden=m)
    parent(prompt())
    torch.testing.assert_close(seen[0], expected)


@torch.no_grad()
def test_soft_channel_mask_is_a_weighted_mean_in_each_group_of_the_gated_norm():
    parent = parent_of("dense").double()
    m, norm = torch.rand(8, 8, dtype=torch.float64), parent.model.layers[0].mixer.norm
    seen = []
    norm.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    norm.register_forward_hook(lambda _, args, output: seen.append(output))
    parent(prompt())
    (y, gate), _ = seen
    weighted = (y * nn.functional.silu(gate) * m.flatten()).view(1, 20, 2, 32)
    means = weighted.square().sum(-1, keepdim=True) / m.view(2, 32).sum(-1)[:, None] + 0.05
    expected = (weighted / means.sqrt()).flatten(-2) * norm.weight
    out_proj_inputs = []
    parent.model.layers[0].mixer.out_proj.register_forward_pre_hook(lambda _, args: out_proj_inputs.append(args[0]))
    attach_masks(parent).masks = Masks(channels={0: m})
    parent(prompt())
    torch.testing.assert_close(out_proj_inputs[0], expected)


@torch.no_grad()
def test_soft_neurons_and_query_heads_are_scaled_columns():
    parent, scaled = parent_of("moe"), parent_of("moe")
    neurons, shared, heads = torch.rand(24), torch.rand(40), torch.rand(4)
    layers = scaled.model.layers
    layers[1].mixer.experts.down_proj.mul_(neurons)
    layers[4].mixer.shared_experts.down_proj.weight.mul_(shared)
    layers[3].mixer.o_proj.weight.mul_(heads.repeat_interleave(16))
    masks = Masks(expert_neurons={1: neurons}, shared_neurons={4: shared}, query_heads={3: heads})
    attach_masks(parent).masks = masks
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        parent.set_experts_implementation(implementation)
        torch.testing.assert_close(parent(prompt()).logits, scaled(prompt()).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_soft_experts_weigh_what_was_chosen_and_zeros_are_never_chosen():
    parent = parent_of("moe").double()
    parent.set_experts_implementation("eager")
    gate, m = parent.model.layers[1].mixer.gate, torch.tensor([1, 0.5, 0, 0.25, 1, 0, 1, 0.75], dtype=torch.float64)
    x = torch.randn(50, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = gate.e_score_correction_bias.clone()
    seen = []
    gate.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    parent.model.layers[1].mixer.experts.register_forward_pre_hook(lambda _, args: seen.extend(args[1:]))
    attach_masks(parent).masks = Masks(experts={1: m})
    parent(inputs_embeds=x[None])
    tokens, indices, weights = seen
    scores = (tokens @ gate.weight.T).sigmoid()
    for token in range(50):
        choice = [(float(scores[token, e]) + float(bias[e]), e) for e in range(8) if m[e] > 0]
        chosen = sorted(e for _, e in sorted(choice)[-3:])
        assert chosen == sorted(indices[token].tolist())
        total = sum(float(scores[token, e] * m[e]) for e in chosen)
        for slot, e in enumerate(indices[token].tolist()):
            assert float(weights[token, slot]) == pytest.approx(2.5 * float(scores[token, e] * m[e]) / total)
    assert torch.equal(gate.e_score_correction_bias, bias)


def soft_masks(config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Masks:
    """A random mask with a gradient on every axis."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator, dtype=dtype) * 0.8 + 0.1).requires_grad_()

    masks = Masks(some(config.hidden_size), some(config.num_hidden_layers))
    for index, kind in enumerate(config.layers_block_type):
        if kind == "mlp":
            masks.neurons[index] = some(config.size("intermediate_size", index))
        elif kind == "linear_attention":
            masks.channels[index] = some(config.mamba_num_heads, config.mamba_head_dim)
        elif kind == "full_attention":
            masks.query_heads[index] = some(config.num_attention_heads)
        else:
            masks.experts[index] = some(config.n_routed_experts)
            masks.expert_neurons[index] = some(config.moe_intermediate_size)
            masks.shared_neurons[index] = some(config.moe_shared_expert_intermediate_size)
    return masks


def leaves(masks: Masks) -> list[torch.Tensor]:
    axes = [masks.neurons, masks.channels, masks.query_heads, masks.experts, masks.expert_neurons, masks.shared_neurons]
    return [masks.hidden, masks.layers, *(mask for axis in axes for mask in axis.values())]


@pytest.mark.parametrize("shape", ["dense", "latent"])
def test_gradients_of_every_mask_are_those_of_small_steps(shape):
    parent = parent_of(shape).double().requires_grad_(False)
    parent.set_experts_implementation("eager")
    masks, ids = soft_masks(parent.config, dtype=torch.float64), prompt(1, 9)
    attach_masks(parent).masks = masks

    def loss() -> torch.Tensor:  # the model's own is in fp32
        return nn.functional.cross_entropy(parent(ids).logits[0, :-1], ids[0, 1:])

    loss().backward()
    for mask in leaves(masks):
        place, step = int(mask.grad.abs().argmax()), 1e-6
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                mask.view(-1)[place] += sign * step
                losses.append(float(loss()))
                mask.view(-1)[place] -= sign * step
        found, expected = float(mask.grad.flatten()[place]), (losses[0] - losses[1]) / (2 * step)
        assert expected != 0 and found == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_recomputing_sees_the_masks_of_its_forward(shape):
    """The masks have changed by the time of the backward pass, as they do between micro-steps."""
    ids, gradients = prompt(2, 17), []
    for checkpointing in (False, True):
        parent = parent_of(shape).train()
        if checkpointing:
            parent.gradient_checkpointing_enable()
        masked, soft = attach_masks(parent), soft_masks(parent.config)
        masked.masks = soft
        loss = parent(ids, labels=ids).loss
        masked.masks = Masks(hidden=torch.ones(48) * 0.5)
        loss.backward()
        weights = {name: p.grad for name, p in parent.named_parameters() if p.grad is not None}
        gradients.append([*(mask.grad for mask in leaves(soft)), *weights.values()])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_hard_masks_give_the_slice_its_gradients():
    """Weights outside of the budget get none, those inside the slice's own."""
    parent, budget = parent_of("dense"), Budget(name="small", **DENSE["all"])
    small, ids = cut_out(parent, budget), prompt(2, 17)
    small(ids, labels=ids).loss.backward()
    attach_masks(parent).masks = child_masks(resolve(parent.config, budget))
    parent(ids, labels=ids).loss.backward()
    inside = parent.model.layers[1].mixer.up_proj.weight.grad
    expected = small.model.layers[1].mixer.up_proj.weight.grad
    torch.testing.assert_close(inside[:52, :40], expected, rtol=1e-4, atol=1e-6)
    assert inside.count_nonzero() == inside[:52, :40].count_nonzero()
    assert parent.model.layers[2].norm.weight.grad is None  # a bypassed layer


@torch.no_grad()
def test_masked_bf16_is_as_near_as_the_slice():
    parent, budget = parent_of("dense"), Budget(name="small", **DENSE["all"])
    exact = cut_out(parent, budget)(prompt(2, 19)).logits
    parent.bfloat16()
    error = (cut_out(parent, budget).bfloat16()(prompt(2, 19)).logits - exact).abs().mean()
    attach_masks(parent).masks = child_masks(resolve(parent.config, budget))
    masked = parent(prompt(2, 19)).logits
    assert masked.dtype == torch.bfloat16 and (masked - exact).abs().mean() < 2 * error


def test_masks_are_attached_once_and_leave_no_trace():
    parent = parent_of("dense")
    classes = [type(block) for block in parent.model.layers]
    masked = attach_masks(parent)
    with pytest.raises(ValueError, match="attached to this model already"):
        attach_masks(parent.model)
    assert {type(block).__name__ for block in parent.model.layers} == {"NemotronHBlock"}
    masked.remove()
    assert [type(block) for block in parent.model.layers] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in parent.modules())
    attach_masks(parent.model)
    with pytest.raises(ValueError, match="holds 0 NemotronHModel"):
        attach_masks(nn.Linear(2, 2))


def test_masks_of_wrong_shapes_are_refused():
    masked = attach_masks(parent_of("dense"))
    for masks, name in (
        (Masks(hidden=torch.ones(47)), "hidden"),
        (Masks(layers=torch.ones(6)), "layers"),
        (Masks(neurons={0: torch.ones(80)}), r"neurons\[0\]"),
        (Masks(channels={0: torch.ones(64)}), r"channels\[0\]"),
    ):
        with pytest.raises(ValueError, match=name):
            masked.masks = masks
