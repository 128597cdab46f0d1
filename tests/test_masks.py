"""Masked forwards against the models that `cuts` makes of the same weights, for every axis alone and all together."""

import copy

import pytest
import torch
from tiny import native_twin, prompt, tiny_model
from torch import nn

from nemotron_h_hf import NemotronHForCausalLM
from nemotron_h_hf.elastic.masks import Masks, attach_masks, budget_masks
from nemotron_h_hf.model.budgets import Budget, budget_config
from nemotron_h_hf.model.slicing import cuts, prefix

DENSE = {
    "hidden": {"hidden_size": 36},
    "neurons": {"intermediate_size": 52},
    "neurons of each layer": {"intermediate_size": (20, 80, 8)},
    "heads": {"mamba_num_heads": 4},
    "heads of each layer": {"mamba_num_heads": (8, 2, 6)},
    "head channels": {"mamba_head_dim": 5},
    "head channels of each layer": {"mamba_head_dim": (8, 3, 5)},
    "query heads": {"num_attention_heads": 2},
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
    "expert neurons": {"moe_intermediate_size": 16},
    "shared neurons": {"moe_shared_expert_intermediate_size": 24},
    "depth": {"layers": (0, 1, 2, 3, 5)},
    "all": {
        "hidden_size": 36, "n_routed_experts": 4, "moe_intermediate_size": 16, "mamba_num_heads": 6, "mamba_head_dim": 5,
        "moe_shared_expert_intermediate_size": 24, "num_attention_heads": 2, "layers": (1, 2, 3, 4, 5),
    },
}  # fmt: skip
LATENT = {**EXPERTS, "experts": {"n_routed_experts": 8}, "all": {**EXPERTS["all"], "n_routed_experts": 8}}
SMALL = {"dense": DENSE, "list": LIST, "moe": EXPERTS, "latent": LATENT}
BIASED = {"use_bias": True, "mlp_bias": True, "attention_bias": True}
WIDE_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
CASES = [(shape, axis) for shape, axes in SMALL.items() for axis in axes]


def parent_of(shape: str, seed: int = 0) -> nn.Module:
    """With biases everywhere, and norms whose eps is large enough to matter."""
    overrides = WIDE_GROUPS if shape == "latent" else {}
    return tiny_model(shape, seed, layer_norm_epsilon=0.05, **BIASED, **overrides)


def cut_out(parent: nn.Module, budget: Budget) -> nn.Module:
    """The small model of a budget, by slicing the parent's tensors as they are saved."""
    config = budget_config(parent.config, budget)
    layers = range(parent.config.num_hidden_layers) if budget.layers is None else budget.layers
    stored = saved_tensors(parent)
    kept = prefix(parent.config, layers, config)
    tensors = {cut.name: cut.of(stored[cut.source]) for cut in cuts(parent.config, kept, config)}
    model = NemotronHForCausalLM(config).eval()
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
    masked.masks = budget_masks(parent.config, budget)
    torch.testing.assert_close(parent(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
    assert (whole - expected).abs().max() > 1e-2
    masked.masks = None
    assert torch.equal(parent(ids).logits, whole)
    masked.remove()
    assert torch.equal(parent(ids).logits, whole)
