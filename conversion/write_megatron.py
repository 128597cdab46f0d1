"""What both Megatron formats share when they are written: the layout asked for, the arguments, the extra states.

TARGET/latest_checkpointed_iteration.txt   "release", written last
TARGET/release/                            the weights
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from nemotron_h_hf.checkpoint import Digest
from nemotron_h_hf.model.configuration_nemotron_h import NemotronHConfig

from . import vision, vision_config
from .config import other_groups, to_args
from .layouts import rank_ranges
from .names import (
    COLUMNS,
    COPY,
    EXTRA_STATE,
    EXTRA_STATE_EXPERTS,
    EXTRA_STATE_LATENT,
    EXTRA_STATE_MTP,
    EXTRA_STATE_TOP,
    PARTS,
    VOCAB,
    check_sizes,
)
from .plan import Job, Plan

CORES = ("auto", "0.16", "0.19")
FOLDER = "release"
Read = Callable[[str], Tensor]


class Written(NamedTuple):
    """What a writer hands back: what it saw of each whole tensor, its files, and those kept from an interrupted run."""

    digests: dict[str, Digest]
    files: list[str]
    kept: list[str]


class Layout(NamedTuple):
    """How a Megatron target is laid out; `pp` is a number of stages or the number of layers of each."""

    format: str
    tp: int
    pp: int | Sequence[int]
    ep: int
    vocab_divisible_by: int
    core: str

    @property
    def vocab_multiple(self) -> int:
        """Rows of the vocabulary come in multiples of this."""
        return self.vocab_divisible_by * self.tp

    def check(self, config: NemotronHConfig) -> None:
        """ValueError for sizes that the model cannot be cut into."""
        if self.core not in CORES:
            raise ValueError(f"core={self.core!r}: allowed are {', '.join(CORES)}")
        for field in ("tp", "ep", "vocab_divisible_by"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: allowed are positive integers")
        stage_sizes(config, self.pp)
        check_sizes(config)
        if self.format == "torch_dist" and (self.tp, self.pp, self.ep) != (1, 1, 1):
            raise ValueError(f"tp={self.tp}, pp={self.pp}, ep={self.ep}: torch_dist is loaded under any parallelism; "
                             f"sizes are for format torch")  # fmt: skip
        if "M" in config.hybrid_override_pattern and config.n_groups % self.tp:
            raise ValueError(f"tp={self.tp}: allowed are divisors of n_groups={config.n_groups}")
        if config.has_experts and config.n_routed_experts % self.ep or not config.has_experts and self.ep != 1:
            raise ValueError(f"ep={self.ep}: allowed are divisors of the number of experts")
        if not isinstance(config.intermediate_size, int):
            raise ValueError("intermediate_size is a list: Megatron has one width for all MLP layers")
        _check_expressible(config)

    def newest(self, config: NemotronHConfig) -> str:
        """The release whose names are written: 0.19 where multi-token prediction needs it."""
        if self.core != "auto":
            return self.core
        return "0.19" if config.num_nextn_predict_layers else "0.16"


def _check_expressible(config: NemotronHConfig) -> None:
    """ValueError for what Megatron's layers have no argument for; it would build another model and not complain."""
    pattern = config.hybrid_override_pattern + config.mtp_hybrid_override_pattern
    fixed = {
        ("M", "use_bias"): False,
        ("M", "use_conv_bias"): True,
        ("M", "conv_kernel"): 4,
        ("M", "time_step_limit"): (0.0, math.inf),
        ("E", "norm_topk_prob"): True,
        ("E", "mlp_bias"): False,
        ("E", "attention_bias"): False,
    }
    for (letter, field), value in fixed.items():
        if letter in pattern and getattr(config, field) != value:
            raise ValueError(f"{field}={getattr(config, field)!r}: Megatron's {letter} layers always have {value!r}")
    if {"*", "-"} <= set(pattern) and config.attention_bias != config.mlp_bias:
        raise ValueError(f"attention_bias={config.attention_bias} and mlp_bias={config.mlp_bias}: Megatron has one "
                         f"switch for both")  # fmt: skip
    if other := other_groups(config):
        raise ValueError(other)


def namespace(plan: Plan, layout: Layout, stages: Sequence[int]) -> argparse.Namespace:
    """The training arguments of a checkpoint that is written."""
    pattern, cuts, start = plan.text.hybrid_override_pattern, [], 0
    for count in stages:
        cuts.append(pattern[start : start + count])
        start += count
    rows = next(job.targets[0].shape[0] for job in plan.jobs if job.link.layout == VOCAB)
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": len(stages),
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp,
        "make_vocab_size_divisible_by": layout.vocab_divisible_by,
    }
    args = to_args(plan.text, rows, sizes, layout.newest(plan.text), "|".join(cuts))
    return argparse.Namespace(**{**args, **vision_config.to_args(plan.config), "ckpt_format": layout.format})


def extra_states(plan: Plan) -> Iterator[tuple[str, int]]:
    """Names of the extra states that Megatron expects of the language model, and how many there are of each."""
    for name, per_expert in _extra_states(plan.text):
        yield vision.prefix(plan.config) + name, plan.text.n_routed_experts if per_expert else 1


def _extra_states(config: NemotronHConfig) -> Iterator[tuple[str, bool]]:
    for name in EXTRA_STATE_TOP:  # with tied embeddings too: the output layer is there, without a weight
        yield f"{name}._extra_state", False
    for layer, letter in enumerate(config.hybrid_override_pattern):
        yield from _extra_states_of(config, letter, f"decoder.layers.{layer}.")
    for depth in range(config.num_nextn_predict_layers):
        for name in EXTRA_STATE_MTP:
            yield f"mtp.layers.{depth}.{name}._extra_state", False
        for inner, letter in enumerate(config.mtp_hybrid_override_pattern):
            yield from _extra_states_of(config, letter, f"mtp.layers.{depth}.mtp_model_layer.layers.{inner}.")


def _extra_states_of(config: NemotronHConfig, letter: str, prefix: str) -> Iterator[tuple[str, bool]]:
    for name in EXTRA_STATE[letter] + (EXTRA_STATE_LATENT if letter == "E" and config.moe_latent_size else ()):
        yield f"{prefix}{name}._extra_state", False
    for name in EXTRA_STATE_EXPERTS if letter == "E" else ():
        yield f"{prefix}mlp.experts.{name}._extra_state", True


def stage_sizes(config: NemotronHConfig, pp: int | Sequence[int]) -> list[int]:
    """The number of layers of each pipeline stage; a plain number of stages shares them as evenly as it goes.

    Raises ValueError when the stages do not add up to the model's layers.
    """
    num_layers = config.num_hidden_layers
    if isinstance(pp, int):
        if not 1 <= pp <= num_layers:
            raise ValueError(f"pp={pp}: allowed are 1 to the {num_layers} layers of the model")
        return [num_layers // pp + (stage < num_layers % pp) for stage in range(pp)]
    if sum(pp) != num_layers or min(pp) < 0:
        raise ValueError(f"pp={list(pp)}: allowed are counts of layers that add up to {num_layers}")
    return list(pp)


def cut_sizes(job: Job) -> list[int]:
    """Sizes of the parts that tensor parallelism cuts one by one, along the axis that it cuts."""
    link, shape = job.link, job.targets[0].shape
    if link.split == COLUMNS:
        return [shape[1]]
    return [size for _, size in link.parts] if link.layout == PARTS else [shape[0]]


def check_cuts(plan: Plan, layout: Layout) -> None:
    """ValueError naming the tensor that cannot be cut for the tensor-parallel ranks."""
    for job in plan.jobs:
        try:
            rank_ranges([] if job.link.split == COPY else cut_sizes(job), layout.tp, 0)
        except ValueError as error:
            raise ValueError(f"tp={layout.tp}: {job.targets[0].name}: {error}") from None
