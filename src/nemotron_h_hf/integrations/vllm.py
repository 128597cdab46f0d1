"""vLLM's plugin: a budget of an elastic parent, without a written slice and without remote code.

    vllm serve path/to/parent --hf-overrides '{"budget": "6b"}'

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. The configuration turns
into that of the budget when vLLM applies the overrides; the model (vllm_model.py) cuts the tensors as they are loaded.
vLLM sizes the states of all Mamba layers alike: budgets that differ there by layer are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from ..elastic.budgets import Budget
from ..elastic.child import Child
from ..elastic.cut.other_readers import nearest_expressible
from ..elastic.resolve import resolve
from ..model.configuration_nemotron_h import PUZZLE_LISTS, NemotronHConfig

ONE_SIZE = ("mamba_num_heads", "mamba_head_dim", "num_attention_heads", *PUZZLE_LISTS)  # for all layers, in vLLM


class BudgetConfig(NemotronHConfig):
    """A parent's configuration, which becomes that of a budget when `budget` is among what it is updated with."""

    cut_from: tuple[dict[str, Any], dict[str, Any]] | None = None  # the parent's entries, and the budget's

    def update(self, config_dict: dict[str, Any]) -> None:
        """As transformers'.

        Raises:
            ValueError: for an unknown budget, or one that vLLM cannot run, with the nearest that it can.
        """
        others = {name: value for name, value in config_dict.items() if name != "budget"}
        if config_dict.get("budget") is not None:
            child = resolve(NemotronHConfig.from_dict(self.to_dict()), config_dict["budget"])
            _check_sizes(child)
            parent = copy.deepcopy(child.parent.to_dict())
            self.__dict__.update(child.config.__dict__)
            self.cut_from = (parent, {"name": child.name, **child.budget.to_dict()})
        super().update(others)

    def child(self) -> Child | None:
        """The budget that this is, with what it keeps of its parent; None for a model as it is stored."""
        if self.cut_from is None:
            return None
        parent, budget = self.cut_from
        return resolve(NemotronHConfig.from_dict(parent), Budget.from_dict(budget["name"], _without_name(budget)))


def register() -> None:
    """Tell transformers and vLLM of our classes; may be called again."""
    from vllm import ModelRegistry

    AutoConfig.register("nemotron_h", BudgetConfig, exist_ok=True)
    model = "nemotron_h_hf.integrations.vllm_model:BudgetNemotronHForCausalLM"
    ModelRegistry.register_model("NemotronHForCausalLM", model)


def cut(weights: Iterable[tuple[str, Tensor]], child: Child) -> Iterator[tuple[str, Tensor]]:
    """The child's tensors from its parent's, in the order of the files; what it does not have is left out."""
    found: dict[str, list] = {}
    for one in child.cuts():
        found.setdefault(one.source, []).append(one)
    for name, tensor in weights:
        for one in found.get(name, ()):
            yield one.name, one.of(tensor)


def _check_sizes(child: Child) -> None:
    for field in ONE_SIZE:
        sizes = getattr(child.config, field)
        if isinstance(sizes, list):
            nearest = nearest_expressible(child).budget.describe()
            raise ValueError(f"budget={child.name!r} has {field}={sizes}: allowed in vLLM is one size, as in {nearest}")


def _without_name(budget: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in budget.items() if key != "name"}
