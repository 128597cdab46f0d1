"""A model whose forward runs with the masks that its own router chooses: router and masks attached from outside.

The router is a submodule of the model and is called inside the model's forward. FSDP2 therefore gathers its weights when
they are needed, reduces its gradients with all others, and saves it with the run's checkpoints; `save_pretrained` omits it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import PreTrainedModel

from ..budgets import Budget
from ..child import Child, child_of
from ..masks import attach_masks, child_masks
from .choices import DEPTH, Axis, budget_of, masks_of
from .curriculum import Draw
from .expected_cost import ExpectedCost, router_loss
from .router import Router, RouterSettings, argmax_indices, budget_vector, choose

ROUTER = "elastic_router"


@dataclass
class Route:
    """The axes that a router decides, and the targets and cost of its loss.

    `targets` are names of budgets and their sizes in the unit of the cost, the largest, the parent itself, first. `fixed` has their
    children where the sizes are known: then there are no axes, and nothing is decided.
    """

    axes: tuple[Axis, ...]
    cost: ExpectedCost
    targets: Mapping[str, float]
    layer_order: Sequence[int] = ()
    settings: RouterSettings = field(default_factory=RouterSettings)
    fixed: Mapping[str, Child] = field(default_factory=dict)


class RoutedModel:
    """Router and masks on a causal LM.

    `sample` says what the next forwards draw, `fix` that they run one budget or, with None, the parent. After a sampled
    forward `router_loss` is the loss of its choice, with a gradient.
    """

    def __init__(self, model: PreTrainedModel, route: Route) -> None:
        self.model, self.route = model, route
        self.router = Router(route.axes, len(route.targets), route.settings)
        model.add_module(ROUTER, self.router.to(next(model.parameters()).device))
        model._keys_to_ignore_on_save = {f"{ROUTER}.{name}" for name in self.router.state_dict()}
        self.masked = attach_masks(model)
        self.router_loss: Tensor | None = None
        self._draw: tuple[Draw, float] | None = None
        # Before the hook of the masks, which passes on what is chosen here.
        self._hook = model.base_model.register_forward_pre_hook(self._choose, prepend=True)

    def sample(self, draw: Draw, progress: float) -> None:
        """The next forwards run what the router chooses for this draw; `progress` of the run, 0 to 1, sets temperature
        and scale."""
        if not self.route.fixed:
            self._draw = (draw, progress)
            return
        child = list(self.route.fixed.values())[draw.budget]
        self.fix(None if child.is_whole() else child)
        self.router_loss = torch.zeros((), dtype=torch.float64)

    def fix(self, child: Child | None) -> None:
        """The next forwards run this child, with hard masks; with None the parent."""
        self._draw = self.router_loss = None
        device = next(self.model.parameters()).device
        self.masked.masks = None if child is None else child_masks(child, device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, forwards run the parent; after it, what was drawn."""
        before = self._draw, self.router_loss, self.masked.masks
        self.fix(None)
        try:
            yield
        finally:
            self._draw, self.router_loss, self.masked.masks = before

    def remove(self) -> None:
        """Give the model back without router and masks."""
        self._hook.remove()
        self.masked.remove()
        delattr(self.model, ROUTER)
        self.model._keys_to_ignore_on_save = set()

    def children(self) -> dict[str, Child]:
        """The most likely choices for every target; the parent itself stays whole."""
        if self.route.fixed:
            return dict(self.route.fixed)
        return {name: self.child(name, target) for name, target in self.route.targets.items()}

    def child(self, name: str, target: float) -> Child:
        """The most likely choice for any target in the trained range.

        Raises:
            ValueError: for a target that is larger or smaller than all that are trained.
        """
        if target >= self.route.cost.full:
            return child_of(self.model.config, Budget(name=name))
        indices = argmax_indices(self.logits(target))
        budget = budget_of(self.model.config, self.route.axes, indices, name, self.route.layer_order)
        return child_of(self.model.config, budget)

    @torch.no_grad()
    def logits(self, target: float) -> dict[str, Tensor]:
        """Field -> (r, c) for a target, outside of a forward; every process of a sharded model has to call it."""
        weights = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
            for name, value in self.router.named_parameters()
        }
        vector = budget_vector(list(self.route.targets.values()), target)
        return functional_call(self.router, weights, vector.to(next(iter(weights.values())).device))

    def expected_size(self, target: float, progress: float) -> float:
        """The cost that the router expects for a target, without noise, as a share of the parent's."""
        scale, temperature = self._schedule(progress)
        return float(self.route.cost(choose(self.logits(target), scale, temperature))) / self.route.cost.full

    def chosen_cost(self, target: float) -> float:
        """The cost of the most likely choices for a target."""
        if target >= self.route.cost.full:
            return self.route.cost.full
        if self.route.fixed:
            return target
        return float(self.route.cost(choose(self.logits(target), 1.0, 1.0, hard=True)))

    def _schedule(self, progress: float) -> tuple[float, float]:
        settings = self.route.settings
        return settings.logit_scale_at(progress), settings.temperature_at(progress)

    def _choose(self, stack: nn.Module, args: tuple) -> None:
        if self._draw is None:
            return
        (index, hard, noise), progress = self._draw
        route, targets = self.route, list(self.route.targets.values())
        device = next(self.router.parameters()).device
        logits = self.router(budget_vector(targets, targets[index]).to(device))
        chosen = choose(logits, *self._schedule(progress), noise, hard)
        self.router_loss = router_loss(route.cost(chosen), targets[index], route.cost.full, chosen, route.axes)
        if hard and DEPTH in chosen:
            chosen = {**chosen, DEPTH: chosen[DEPTH].detach()}  # then layers that are left out do not run
        self.masked.masks = masks_of(self.model.config, route.axes, chosen, route.layer_order)
