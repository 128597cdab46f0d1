"""Sizes and budgets for a parent when none are given: eighths of its widths, and models of 3/4 and 1/2 of its parameters.

Widths are rounded to sizes that suit hardware (multiples of 64 in full-size models) and to the needs of the groups. A default
budget takes the same share of every width, all layers, all heads of attention and all routed experts: at equal size, narrower
models lose less than shallower ones (Nemotron Elastic, Minitron-SSM), and attention is too small to be worth cutting.
Key/value heads are few; by default they are not cut.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ...cost import num_parameters
from ...model.configuration_nemotron_h import NemotronHConfig
from ...tensors import AXES, AXIS_OF, num_groups
from ..budgets import Budget
from ..child import child_of

EIGHTHS = (8, 7, 6, 5, 4)
WIDTHS = 256  # shares of the widths that are tried
SCALED_TOGETHER = ("hidden_size", "intermediate_size", "mamba_num_heads", "moe_intermediate_size",
                   "moe_shared_expert_intermediate_size")  # fmt: skip


def default_choices(config: NemotronHConfig) -> dict[str, list[int]]:
    """Sizes of each axis that the model has, the parent's own first; none where the parent's own differ by layer."""
    choices = {}
    kinds = {None, *config.layers_block_type}
    for field in [axis.field for axis in AXES if axis.kind in kinds and axis.name != "key_value_heads"]:
        whole = getattr(config, field)
        if isinstance(whole, int):
            sizes = {scaled(config, field, whole, eighths / 8) for eighths in EIGHTHS}
            choices[field] = sorted(sizes, reverse=True)
    return choices


def default_depths(config: NemotronHConfig, fewest: int) -> list[int]:
    """How many layers may stay, eighths of all of them down to `fewest`, the parent's own left out."""
    count = config.num_hidden_layers
    return sorted({d for d in (round(count * e / 8) for e in EIGHTHS) if max(fewest, 1) <= d < count}, reverse=True)


def default_budgets(config: NemotronHConfig, shares: Sequence[float] = (0.75, 0.5)) -> list[Budget]:
    """One budget for each share of the parent's parameters, the largest that is not above it, named by its size ("6b").

    Raises:
        ValueError: if even the narrowest model that is allowed is larger than a share.
    """

    def size(width: int) -> int:
        return child_of(config, _scaled_budget(config, width / WIDTHS)).num_parameters

    parent, found = num_parameters(config), {}
    for share in shares:
        width = bisect_right(range(1, WIDTHS + 1), share * parent, key=size)
        if width == 0:
            raise ValueError(f"budgets: no width gives {share:.0%} of the parent's {parent:,} parameters; name budgets")
        name = size_name(size(width))
        found[name] = Budget.from_dict(name, _scaled_budget(config, width / WIDTHS).to_dict())
    return list(found.values())


def scaled(config: NemotronHConfig, field: str, whole: int, share: float) -> int:
    """`share` of a size, rounded to the nearest allowed one, never to 0."""
    # What is in groups is counted, and needs no multiples for the hardware
    step = num_groups(config, field) if AXIS_OF[field].groups else _step(whole)
    least = step
    if field == "n_routed_experts":
        most = config.num_experts_per_tok
        most = max(most) if isinstance(most, list) else most
        least = max(most, 2 * config.n_group if config.n_group > 1 else 1)
        least = -(-least // step) * step
    return min(whole, max(least, round(whole * share / step) * step))


def size_name(parameters: int) -> str:
    """12310000000 -> "12.3b", 1781234 -> "1.78m"."""
    for unit, letter in ((10**9, "b"), (10**6, "m"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)


def _scaled_budget(config: NemotronHConfig, share: float) -> Budget:
    kinds = {None, *config.layers_block_type, *(config.mtp_layers_block_type or ())}
    there = {axis.field for axis in AXES if axis.kind in kinds}
    sizes = {}
    for field in (field for field in SCALED_TOGETHER if field in there):
        whole = getattr(config, field)
        if isinstance(whole, list):
            sizes[field] = tuple(scaled(config, field, size, share) for size in whole)
        elif (size := scaled(config, field, whole, share)) != whole:
            sizes[field] = size
    return Budget(name="scaled", **sizes)


def _step(whole: int) -> int:
    """A power of two up to 64 that is at most a sixteenth of the size."""
    step = 64
    while step > 1 and step * 16 > whole:
        step //= 2
    return step
