"""The teacher in memory once, its neurons in an order in which every candidate is a budget: views, no second copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compression.importance import WidthScores, importance_of, importance_order
from ..elastic.live.parent import NemotronHElasticForCausalLM
from ..elastic.prepare.permuting import permute_model
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.modeling_nemotron_h import NemotronHForCausalLM
from ..slicing import Kept, everything
from ..tensors import together

WIDTHS = ("neurons", "expert_neurons", "shared_neurons")  # what a control orders otherwise


class MemoryImage:
    """A parent, and the models of sizes that were asked for."""

    def __init__(self, parent: NemotronHElasticForCausalLM, rule: str) -> None:
        self.parent, self.rule = parent, rule
        self._models: dict[str, NemotronHElasticForCausalLM] = {}

    @classmethod
    def of(cls, model: NemotronHForCausalLM, order: Kept, rule: str = "importance") -> MemoryImage:
        """Take over a model; `order` holds all of its indices."""
        permute_model(model, order)
        return cls(NemotronHElasticForCausalLM.from_model(model.requires_grad_(False).eval()), rule)

    def model_of(self, sizes: Mapping[str, Any]) -> NemotronHElasticForCausalLM:
        """The model of a budget; kept, as several candidates have its sizes."""
        key = str(dict(sizes))
        if key not in self._models:
            self._models[key] = self.parent.submodel(sizes) if sizes else self.parent
        return self._models[key]

    def save(self, sizes: Mapping[str, Any], folder: Path) -> None:
        """One budget as an ordinary checkpoint."""
        self.parent.submodel(sizes).save_pretrained(folder)


def order_of(config: NemotronHConfig, scores: WidthScores, fields: set[str], rule: str = "importance") -> Kept:
    """All indices of a model; of the axes that `fields` need (heads with their channels), the most important first.

    Args:
        rule: "importance", or for controls "reversed" or "random:SEED", which change the order of neurons alone.
    """
    by_importance, own = importance_order(config, importance_of(config, scores)), everything(config)
    axes = {axis.name for name in fields for axis in together(name)}
    order = replace(own, **{axis: getattr(by_importance, axis) for axis in axes})
    if rule == "importance":
        return order
    changed = {axis: {layer: _otherwise(kept, rule) for layer, kept in getattr(order, axis).items()}
               for axis in axes & set(WIDTHS)}  # fmt: skip
    return replace(order, **changed)


def _otherwise(kept: Tensor, rule: str) -> Tensor:
    """The last dimension in another order."""
    if rule == "reversed":
        return kept.flip(-1)
    generator = torch.Generator().manual_seed(int(rule.partition(":")[2]))
    return kept.index_select(-1, torch.randperm(kept.shape[-1], generator=generator))
