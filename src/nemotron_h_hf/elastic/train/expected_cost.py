"""What a router's choice costs: parameters, memory or time, differentiable in its probabilities, and the loss made of it.

Parameters and bytes come from the formulas of `cost.py` themselves, read on a configuration whose sizes are expected
values: a choice of one size on each axis therefore costs exactly what its model has (num_parameters, weight_bytes, cache_bytes).
Between choices it is the mean over independent axes (but for MTP's joining matrix, whose two sides are one size).

    loss = |cost / target - 1|, 0 within 5 % of the target              for a budget below the whole
    loss = |cost / full - 1| + 10 * sum over axes of MSE(pi, one-hot)   for the whole, which pins it to the parent

    r rows, c choices, L layers
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import cost
from ...model.configuration_nemotron_h import NemotronHConfig
from ...tensors import WeightShape, checkpoint_tensors
from ..budgets import FIELDS_OF_KIND, heads_left
from .choices import DEPTH, Axis, Probabilities, full, kept_layers

METRICS = ("parameters", "memory", "latency")
DEAD_ZONE = 0.05
IDENTITY_WEIGHT = 10.0


class ExpectedCost:
    """The cost of probabilities on the CPU in fp64, a scalar; `full` is the parent's.

    Args:
        metric: parameters (a number), memory (bytes: weights, and the caches of `batch_size` sequences of
            `context_tokens`), or latency (seconds, of `latency`, the table that `measure_latency` makes).
        layer_order: for choices of depth.
        dtype: of weights and caches in memory.

    Raises:
        ValueError: for an unknown metric, or a table that was measured for other choices.
    """

    def __init__(
        self,
        config: NemotronHConfig,
        axes: Sequence[Axis],
        metric: str = "parameters",
        layer_order: Sequence[int] = (),
        context_tokens: int = 8192,
        batch_size: int = 1,
        dtype: str = "bfloat16",
        latency: Mapping[str, Any] | None = None,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}: allowed are {', '.join(METRICS)}")
        self.config, self.axes, self.metric, self.layer_order = config, tuple(axes), metric, layer_order
        self.context_tokens, self.batch_size, self.dtype = context_tokens, batch_size, dtype
        if metric == "latency":
            check_latency(config, axes, latency)
            self.seconds = {k: torch.tensor(v, dtype=torch.float64) for k, v in latency["seconds"].items()}
        self.full = float(self(full(axes)))

    def __call__(self, probabilities: Probabilities) -> Tensor:
        """Field -> (r, c) -> the expected cost. One copy from the device, then arithmetic with a few hundred scalars."""
        probabilities = {field: chosen.double().cpu() for field, chosen in probabilities.items()}
        shares = _shares_of_layers(self.config, self.axes, probabilities, self.layer_order)
        if self.metric == "latency":
            return _seconds(self.config, self.axes, probabilities, shares, self.seconds)
        expected = expected_config(self.config, self.axes, probabilities)
        if self.metric == "parameters":
            return _sum_of_tensors(expected, shares, lambda tensor: tensor.num_elements)
        weights = _sum_of_tensors(expected, shares, lambda tensor: cost.stored_bytes(tensor, self.dtype))
        caches = [
            share * cost.layer_cache_bytes(expected, layer, self.context_tokens, self.dtype)
            for layer, share in enumerate(shares)
        ]
        return weights + self.batch_size * torch.stack(caches).sum()


def router_loss(
    cost_now: Tensor, target: float, full_cost: float, probabilities: Probabilities, axes: Sequence[Axis]
) -> Tensor:
    """The loss of the head of the file: a scalar; `target` in the unit of the cost.

    Within the dead zone it and its gradient are 0; outside it begins at 5 %.
    """
    off = (cost_now / target - 1).abs()
    if target < full_cost:
        return torch.where(off < DEAD_ZONE, torch.zeros_like(off), off)
    whole = full(axes)
    distance = [(chosen - whole[field].to(chosen)).square().mean() for field, chosen in probabilities.items()]
    return off + IDENTITY_WEIGHT * torch.stack(distance).sum().to(off)


def expected_config(config: NemotronHConfig, axes: Sequence[Axis], probabilities: Probabilities) -> NemotronHConfig:
    """A configuration whose sizes are tensors, the expected ones. Good for formulas, not for models."""
    expected = copy.copy(config)
    for axis in axes:
        if axis.field != DEPTH:
            sizes = axis.expected(probabilities[axis.field])
            one = axis.field not in config.PER_LAYER_FIELDS
            vars(expected)[axis.field] = sizes[0] if one else list(sizes)  # past the checks, which want integers
    if any(axis.field == "num_key_value_heads" for axis in axes):
        heads = heads_left(config, expected.num_attention_heads, expected.num_key_value_heads)
        vars(expected)["num_attention_heads"] = heads
    return expected


def check_latency(config: NemotronHConfig, axes: Sequence[Axis], table: Mapping[str, Any] | None) -> None:
    """Raise a ValueError unless the table has times for these choices."""
    if not table or "seconds" not in table or "choices" not in table:
        raise ValueError(
            "latency=None: allowed is a table of seconds and choices; nemotron-h elastic-train --measure_latency makes one"
        )
    config.require_uniform(*config.PER_LAYER_FIELDS)
    wanted = choices_of(axes)
    if table["choices"] != wanted:
        raise ValueError(
            f"latency: its table was measured for choices {table['choices']}: allowed are this run's {wanted}"
        )
    if missing := {*config.layers_block_type, "outside"} - set(table["seconds"]):
        raise ValueError(f"latency: its table has no times of {min(missing)}")


def timed_fields(kind: str, choices: Collection[str]) -> tuple[str, ...]:
    """The dimensions that a kind of layer has in a table of times, behind hidden_size; key/value heads only if chosen."""
    return tuple(field for field in FIELDS_OF_KIND[kind] if field != "num_key_value_heads" or field in choices)


def choices_of(axes: Sequence[Axis]) -> dict[str, list[int]]:
    """Field -> sizes, the parent's first; without depth, which has no cost itself."""
    return {axis.field: list(axis.sizes[0]) for axis in axes if axis.field != DEPTH}


def _shares_of_layers(
    config: NemotronHConfig, axes: Sequence[Axis], probabilities: Probabilities, layer_order: Sequence[int]
) -> Tensor:
    """(L): how likely each layer stays."""
    for axis in axes:
        if axis.field == DEPTH:
            return probabilities[DEPTH][0] @ kept_layers(axis.sizes[0], layer_order).double()
    return torch.ones(config.num_hidden_layers, dtype=torch.float64)


def _sum_of_tensors(expected: NemotronHConfig, shares: Tensor, amount: Callable[[WeightShape], Any]) -> Tensor:
    """The sum of `amount` over the tensors of a checkpoint, those of a layer times its share."""
    outside, layers = 0.0, [0.0] * len(shares)
    for tensor in checkpoint_tensors(expected):
        if (layer := tensor.stack_layer) is None:
            outside = outside + amount(tensor)
        else:
            layers[layer] = layers[layer] + amount(tensor)
    return outside + (torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in layers]) * shares).sum()


def _seconds(
    config: NemotronHConfig,
    axes: Sequence[Axis],
    probabilities: Probabilities,
    shares: Tensor,
    seconds: dict[str, Tensor],
) -> Tensor:
    """The mean of the table's times: of what is outside the layers, and of every layer."""
    by_field = {axis.field: axis for axis in axes}

    def mean(times: Tensor, fields: Sequence[str], layer: int | None = None) -> Tensor:
        for field in fields:  # the first dimension of what is left is this field's
            axis = by_field.get(field)
            if axis is None:
                times = times[0]
            else:
                row = axis.layers.index(layer) if axis.per_layer else 0
                times = torch.tensordot(probabilities[field][row], times, dims=1)
        return times

    total = mean(seconds["outside"], ("hidden_size",))
    for layer, kind in enumerate(config.layers_block_type):
        total = total + shares[layer] * mean(seconds[kind], ("hidden_size", *timed_fields(kind, by_field)), layer)
    return total
