"""The end of elastic training: the router's choices become budgets of the configuration, with losses on held-out text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers.utils import logging

from ...model.configuration_nemotron_h import NemotronHConfig
from ..budgets import Elastic, read_elastic
from ..child import Child, child_of
from .choices import Axis, budget_of
from .expected_cost import choices_of
from .routed_model import Route

logger = logging.get_logger(__name__)


def elastic_after(
    config: NemotronHConfig,
    route: Route,
    children: Mapping[str, Child],
    losses: Mapping[str, float],
    single_losses: Mapping[str, float] | None = None,
) -> Elastic:
    """The `config.elastic` of the trained parent.

    Budgets that were named before and not trained are dropped, and losses too: the weights have changed.

    Args:
        children: the router's choices; trained are those that are targets of the route.
        losses: cross-entropy on held-out text by name, as far as it was measured.
        single_losses: the same for the children of `single_sizes`.
    """
    losses = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    before = read_elastic(config) if config.elastic else Elastic({}, {}, (), {})
    if dropped := sorted(set(before.budgets) - set(children)):
        logger.warning(f"budgets {', '.join(dropped)} are left out of the configuration: this run did not train them")
    found = {
        name: replace(child.budget, trained=name in route.targets, loss=losses.get(name))
        for name, child in children.items()
    }
    uniform = all(len(set(axis.sizes)) <= 1 for axis in route.axes)
    known = route.axes and uniform
    choices = {field: tuple(sizes) for field, sizes in choices_of(route.axes).items()} if known else before.choices
    order = tuple(route.layer_order) or before.layer_order
    parent = next(iter(route.targets))
    calibration: dict = {"loss": losses[parent]} if parent in losses else {}
    for name, loss in (single_losses or {}).items():
        field, size = name.split("=")
        if not math.isfinite(loss):
            continue
        calibration.setdefault(field, {})[size] = loss
    return Elastic(found, choices, order, calibration)


def single_sizes(config: NemotronHConfig, axes: Sequence[Axis], layer_order: Sequence[int] = ()) -> dict[str, Child]:
    """`field=size` -> the child in which that alone is smaller, for every smaller size of every axis."""
    found = {}
    for axis in axes:
        for index in range(1, axis.num_choices):
            indices = {other.field: [0] * other.num_rows for other in axes} | {axis.field: [index] * axis.num_rows}
            name = f"{axis.field}={max(sizes[index] for sizes in axis.sizes)}"
            found[name] = child_of(config, budget_of(config, axes, indices, name, layer_order))
    return found
