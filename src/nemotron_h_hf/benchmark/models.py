"""The models that a GPU benchmark compares: ours, transformers' own with the same weights, and transformers of equal size.

`ours` is a preset or a checkpoint, whole or a slice of its depth. `native` shares its weights. `llama` and `qwen2` have
Llama-3.1-8B's and Qwen2.5-7B's shapes next to the 8B (with fewer layers next to some of its layers), and shapes scaled to the same
number of parameters next to every other model. Weights are random unless a checkpoint is loaded whole.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.nemotron_h import NemotronHConfig as NativeConfig
from transformers.models.nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from .. import cost
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.modeling_nemotron_h import NemotronHForCausalLM
from .work import Costs, costs_of

SEED = 0
TINY, SMALL = "tiny", "189m"  # in addition to the presets of the released models
SHAPES = {
    TINY: {
        "hybrid_override_pattern": "M-M*-M-", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
        "n_groups": 2, "chunk_size": 32, "vocab_size": 512,
    },
    SMALL: {
        "hybrid_override_pattern": "M-M-M*-M-M-M*-M-", "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "mamba_num_heads": 32, "mamba_head_dim": 64,
        "ssm_state_size": 128, "n_groups": 8, "chunk_size": 128, "vocab_size": 32000,
    },
}  # fmt: skip
REAL_8B = "nemotron-h-8b"
LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip
QWEN2_7B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064,
}  # fmt: skip
PEERS = {"llama": (LlamaConfig, LlamaForCausalLM, LLAMA_8B), "qwen2": (Qwen2Config, Qwen2ForCausalLM, QWEN2_7B)}
SIDES = ("ours", "native", *PEERS)


@dataclass(frozen=True)
class Side:
    """One model of the comparison, its configuration in our terms, and what its jobs cost."""

    name: str
    model: nn.Module
    config: PreTrainedConfig
    costs: Costs

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def read_config(name: str, layers: int | None) -> NemotronHConfig:
    """The configuration of a preset or checkpoint, or of a slice of its depth.

    Raises:
        ValueError: for unknown names, and for a slice of a model whose widths differ by layer.
    """
    if name in SHAPES:
        config = NemotronHConfig(**SHAPES[name])
    elif Path(name).is_dir():
        config = NemotronHConfig.from_pretrained(name)
    else:
        config = NemotronHConfig.from_preset(name)
    return config if layers is None else depth_slice(config, layers)


def depth_slice(config: NemotronHConfig, layers: int) -> NemotronHConfig:
    """As many layers in a row, from the first place that has most kinds of them and begins with a Mamba layer."""
    pattern = config.hybrid_override_pattern
    if not 0 < layers <= len(pattern):
        raise ValueError(f"--layers {layers}: allowed are 1 to the {len(pattern)} layers of {pattern}")
    windows = [pattern[start : start + layers] for start in range(len(pattern) - layers + 1)]
    chosen = max(windows, key=lambda window: (len(set(window)), window[0] == pattern[0]))
    config.require_uniform(*config.PER_LAYER_FIELDS)
    fields = config.to_dict()
    for field in ("num_hidden_layers", "num_nextn_predict_layers", "mtp_hybrid_override_pattern", "architectures"):
        fields.pop(field, None)
    chosen_layers = {**fields, "hybrid_override_pattern": chosen}
    return NemotronHConfig(**chosen_layers, mamba_implementation=config.mamba_implementation)


def build_ours(
    config: NemotronHConfig, dtype: torch.dtype, device: torch.device, checkpoint: str | None = None
) -> Side:
    """Our model, from a checkpoint folder or with random weights in which every layer matters."""
    if checkpoint is not None:
        model = NemotronHForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device)
    else:
        model = _random(NemotronHForCausalLM, config, dtype, device)
        spread_weights(model)
    return Side("ours", model.eval(), model.config, costs_of(model.config, name_of(dtype)))


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Weights that let every layer matter; fresh ones are so small and even that the gate would miss mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif name.endswith(".D"):
            parameter.normal_()


def build_native(ours: Side) -> Side:
    """transformers' own model on the very tensors of ours.

    Raises:
        ValueError: where it has no such model (widths that differ by layer).
    """
    config = ours.config
    config.require_uniform(*config.PER_LAYER_FIELDS)
    with torch.device("meta"):
        model = NativeForCausalLM(NativeConfig(**config.to_dict()))
    weights = {name: tensor for name, tensor in ours.model.state_dict().items() if not name.startswith("mtp.")}
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(True)
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            # Its prefill, not its decoding, clamps step sizes from below by time_step_min; the reference never does.
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return Side("native", model.eval(), ours.config, ours.costs)


def build_peer(name: str, like: NemotronHConfig, whole: NemotronHConfig, dtype: torch.dtype, device: str) -> Side:
    """A Llama- or Qwen2-shaped model to compare with `like`, some layers of `whole` or all of it."""
    _, model_class, _ = PEERS[name]
    config = peer_config(name, like, whole)
    model = _random(model_class, config, dtype, device)
    return Side(name, model.eval(), config, costs_of(config, name_of(dtype)))


def peer_config(name: str, like: NemotronHConfig, whole: NemotronHConfig) -> PreTrainedConfig:
    """The real shape next to the 8B, with fewer layers in proportion; otherwise widths and depth of equal parameters."""
    config_class, _, real = PEERS[name]
    room = {"max_position_embeddings": 1 << 21, "pad_token_id": None}
    if cost.num_parameters(whole) == cost.num_parameters(NemotronHConfig.from_preset(REAL_8B)):
        layers = real["num_hidden_layers"] * like.num_hidden_layers / whole.num_hidden_layers
        return config_class(**{**real, "num_hidden_layers": max(1, round(layers))}, **room)
    heads_per_key = real["num_attention_heads"] // real["num_key_value_heads"]
    head_dim = min(like.head_dim, like.hidden_size)
    key_heads = max(1, like.hidden_size // head_dim // heads_per_key)
    hidden = key_heads * heads_per_key * head_dim
    width = hidden * real["intermediate_size"] // real["hidden_size"]
    shape = {
        "hidden_size": hidden, "intermediate_size": width, "num_attention_heads": key_heads * heads_per_key,
        "num_key_value_heads": key_heads, "vocab_size": like.vocab_size,
    }  # fmt: skip
    one, two = (costs_of(config_class(**shape, num_hidden_layers=n), "bfloat16").weight_bytes / 2 for n in (1, 2))
    layers = max(1, round(1 + (cost.num_parameters(like, with_mtp=False) - one) / (two - one)))
    return config_class(**shape, num_hidden_layers=layers, **room)


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _random(model_class: type, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Random weights made on the device itself, where billions of them take seconds."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config)
    finally:
        torch.set_default_dtype(before)
