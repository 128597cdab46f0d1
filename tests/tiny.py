"""Tiny models of every kind in the family, with weights spread to show mistakes, and their twins in transformers.

Fresh weights hide errors: norms of one, D of one and tiny step sizes make many wrong formulas agree. Here norms are in
[0.5, 1.5], D and the convolution are normal, step sizes run from 1e-4 to 1.3, and logits have a deviation of 1 to 2.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig as NativeConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from nemotron_h_hf import NemotronHConfig, NemotronHForCausalLM, hub

VOCAB = 97

# Attention is 64 wide and Mamba 64, neither of which follows from the hidden size of 48.
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8,
    "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS = {
    "hybrid_override_pattern": "MEM*EM", "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 2.5,
}  # fmt: skip
SHAPES = {
    "dense": {"hybrid_override_pattern": "M-M*-M-"},
    "square": {
        "hybrid_override_pattern": "M*-M", "num_attention_heads": 3, "num_key_value_heads": 1, "mamba_num_heads": 12,
    },
    "list": {"hybrid_override_pattern": "M-M*-M-", "intermediate_size": [24, 80, 8]},
    "attention_free": {"hybrid_override_pattern": "M-M-"},
    "moe": EXPERTS,
    "latent": {**EXPERTS, "moe_latent_size": 32, "n_group": 4, "topk_group": 2},
}  # fmt: skip


def tiny_config(shape: str = "dense", **overrides) -> NemotronHConfig:
    """The configuration of one of SHAPES."""
    return NemotronHConfig(**{**COMMON, **SHAPES[shape], **overrides})


def tiny_model(shape: str = "dense", seed: int = 0, model_class: type = NemotronHForCausalLM, **overrides) -> nn.Module:
    """A model of that shape in fp32, in eval mode."""
    return spread(model_class(tiny_config(shape, **overrides)), seed).eval()


@torch.no_grad()
def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer a value that matters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("norm.weight", "norm_f.weight")):
            uniform(tensor, 0.5, 1.5)
        elif name.endswith("conv1d.weight"):
            normal(tensor, 0.5)
        elif name.endswith("A_log"):
            uniform(tensor, 0.0, math.log(16))
        elif name.endswith("dt_bias"):
            uniform(tensor, -9.0, 1.0)
        elif name.endswith((".D", "embeddings.weight")):
            normal(tensor, 1.0)
        elif name.endswith(("bias", "e_score_correction_bias")):
            normal(tensor, 0.3)
        elif name == "lm_head.weight":
            normal(tensor, 1.5 / math.sqrt(tensor.shape[-1]))
        else:
            normal(tensor, 0.7 / math.sqrt(tensor.shape[-1]))
    return model


@torch.no_grad()
def native_twin(model: nn.Module) -> nn.Module:
    """transformers' own model with the same weights: MLPs zero-padded to the widest, its step clamp off."""
    config = model.config.to_dict()
    widest = max(model.config.mlp_widths, default=8)
    native = NativeForCausalLM(NativeConfig(**{**config, "intermediate_size": widest})).eval()
    target = native.state_dict()
    for name, tensor in model.state_dict().items():
        target[name].zero_()
        target[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    for layer in native.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return native


def prompt(batch: int = 1, length: int = 20, seed: int = 1) -> Tensor:
    """Random token ids (batch, length) that are neither pad, bos nor eos."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def put_code_next_to(folder: Path) -> list[str]:
    """Make a folder what `nemotron-h push --with-code` sends of it; the names written."""
    made = {
        name: it for name, it in hub.plan_upload(folder, "owner/name", with_code=True).items() if isinstance(it, bytes)
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return sorted(made)
