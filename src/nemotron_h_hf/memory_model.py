"""What a model takes at inference: weights, KV cache, SSM state and convolution state, each in its own precision.

    Deployment("fp4", "fp8", "bf16", num_tokens=1_000_000)      # the setting of MiniPuzzle (arXiv 2504.03624)
    memory(config, deployment).total                            # 31.68 GiB for Nemotron-H-47B, 45.73 GiB for the 56B

Activations are not counted. fp4 is half a byte; nvfp4 adds a scale of one byte for every 16 elements.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from . import cost
from .errors import require
from .model.configuration_nemotron_h import NemotronHConfig
from .tensors import checkpoint_tensors

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn", "nvfp4": "nvfp4",
              "fp4": "fp4"}  # fmt: skip
"""Names for people -> names of cost.py."""


@dataclass(frozen=True)
class Deployment:
    """In which precisions a model runs, on how many sequences of how many tokens; `conv` None is as `state`."""

    weights: str = "bf16"
    kv: str = "bf16"
    state: str = "fp32"
    conv: str | None = None
    num_tokens: int = 0
    sequences: int = 1

    def __post_init__(self) -> None:
        for name in ("weights", "kv", "state", "conv"):
            value = getattr(self, name)
            require(value in PRECISIONS or (name == "conv" and value is None), name, value, ", ".join(PRECISIONS))
        require(self.num_tokens >= 0, "num_tokens", self.num_tokens, "0 or more")
        require(self.sequences >= 1, "sequences", self.sequences, "1 or more")

    def dtype(self, part: str) -> str:
        """The precision of "weights", "kv", "state" or "conv" under its name in cost.py."""
        return PRECISIONS[getattr(self, part) or self.state]

    def describe(self) -> str:
        """For people."""
        count = f"{self.sequences:,} sequence{'s' * (self.sequences > 1)} of {self.num_tokens:,} tokens"
        return f"{count}; weights {self.weights}, KV {self.kv}, SSM state {self.state}, conv state {self.conv or self.state}"


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: float
    kv: float
    state: float
    conv: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.kv + self.state + self.conv


def memory(config: NemotronHConfig, deployment: Deployment) -> Memory:
    """Bytes of a whole model."""
    return Memory(
        cost.weight_bytes(config, deployment.dtype("weights")),
        deployment.sequences * deployment.num_tokens * cost.kv_bytes_per_token(config, deployment.dtype("kv")),
        deployment.sequences * cost.ssm_state_bytes(config, deployment.dtype("state")),
        deployment.sequences * cost.conv_state_bytes(config, deployment.dtype("conv")),
    )


def memory_by_layer(config: NemotronHConfig, deployment: Deployment) -> Counter[int | None]:
    """Bytes of each layer of the stack, and under None of what is outside of it; the sum is `memory(...).total`."""
    found: Counter[int | None] = Counter()
    for tensor in checkpoint_tensors(config):
        found[tensor.stack_layer] += cost.stored_bytes(tensor, deployment.dtype("weights"))
    kv, state, conv = (cost.bytes_per_element(deployment.dtype(part)) for part in ("kv", "state", "conv"))
    for layer in range(config.num_hidden_layers):
        kept = cost.cache_elements(config, layer)
        found[layer] += deployment.sequences * (
            deployment.num_tokens * kept.kv * kv + kept.state * state + kept.conv * conv
        )
    return found
