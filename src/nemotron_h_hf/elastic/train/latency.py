"""A table of times on this machine: one layer of each kind in every combination of the sizes that a router may choose.

    {"choices": {"hidden_size": [5120, 4096], "intermediate_size": [20480, 16384, 12288]},
     "seconds": {"outside": [s, s], "mlp": [[s, s, s], [s, s, s]], ...},      by hidden_size, then by the kind's own sizes
     "batch_size": 1, "sequence_length": 2048, "device": "cpu", "dtype": "float32", "repeats": 5}

A time is that of a forward pass without gradients and without a cache over batch_size x sequence_length tokens, the best of
several. `outside` is embeddings, final norm and lm_head. A model's time is the sum over its parts. Work that overlaps on a
device is counted twice: compare sizes with it, do not predict a speed.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...model.blocks import NemotronHBlock, NemotronHRMSNorm
from ...model.configuration_nemotron_h import NemotronHConfig
from ..budgets import Budget, heads_left
from ..child import child_of
from .choices import Axis
from .expected_cost import choices_of, timed_fields


def measure_latency(
    config: NemotronHConfig,
    axes: Sequence[Axis],
    batch_size: int = 1,
    sequence_length: int = 2048,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The table, JSON-able.

    Raises:
        ValueError: for a model whose layers of a kind differ in size.
    """
    config.require_uniform(*config.PER_LAYER_FIELDS)
    choices = choices_of(axes)
    kinds = {kind: timed_fields(kind, choices) for kind in dict.fromkeys(config.layers_block_type)} | {"outside": ()}
    combinations = [
        (kind, sizes)
        for kind, own in kinds.items()
        for sizes in itertools.product(
            *(choices.get(field, [getattr(config, field)]) for field in ("hidden_size", *own))
        )
    ]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind, sizes in tqdm(combinations, desc="measuring", unit="size"):
        small = one_layer(config, dict(zip(("hidden_size", *kinds[kind]), sizes)), kind)
        module = (Outside(small) if kind == "outside" else NemotronHBlock(small, 0, kind)).to(device, dtype).eval()
        x = torch.randn(batch_size, sequence_length, small.hidden_size, device=device, dtype=dtype)
        seconds[kind].append(best_time(partial(module, x), repeats, torch.device(device)))
    shapes = {kind: [len(choices.get(field, [0])) for field in ("hidden_size", *own)] for kind, own in kinds.items()}
    return {
        "choices": choices,
        "seconds": {kind: torch.tensor(found, dtype=torch.float64).view(shapes[kind]).tolist()
                    for kind, found in seconds.items()},
        "batch_size": batch_size, "sequence_length": sequence_length, "repeats": repeats,
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


@torch.no_grad()
def best_time(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of the fastest of `repeats` calls, after one to warm up."""
    best = float("inf")
    for attempt in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start) if attempt else best
    return best


def one_layer(parent: NemotronHConfig, sizes: dict[str, int], kind: str) -> NemotronHConfig:
    """The configuration with these sizes and a single layer of a kind, any if it is for what is outside of the layers."""
    if "num_attention_heads" in sizes:
        heads = heads_left(parent, sizes["num_attention_heads"], sizes.get("num_key_value_heads"))
        sizes = {**sizes, "num_attention_heads": heads}
    index = 0 if kind == "outside" else parent.layers_block_type.index(kind)
    small = child_of(parent, Budget(name=kind, layers=(index,), **sizes)).config
    small._attn_implementation = parent._attn_implementation or "sdpa"
    return small


class Outside(nn.Module):
    """What a model has outside of its layers, from hidden states to logits; looking up embeddings takes almost no time."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.norm_f = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(b, l, hidden) -> (b, l, vocabulary)."""
        return self.lm_head(self.norm_f(hidden_states))
