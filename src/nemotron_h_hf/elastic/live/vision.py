"""A vision-language parent and its nested models in one memory: tower and projector are shared, the language model as in parent.py.

    parent = NemotronHElasticForConditionalGeneration.from_pretrained("path/to/vl-parent")
    small = parent.submodel("half")                        # a vision-language model; no second copy of the weights
    parent.generate(**inputs, budget="half")

A submodel's last matrix of the projector is the first rows of the parent's.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from ...model.configuration_nemotron_h_vl import NemotronHVLConfig
from ...model.modeling_nemotron_h_vl import NemotronHVLForConditionalGeneration
from ..budgets import Budget
from ..resolve import Request
from ..vision import language_model_of
from .generating import BudgetSchedule
from .parent import NemotronHElasticForCausalLM


class NemotronHElasticForConditionalGeneration(NemotronHVLForConditionalGeneration):
    """A parent that sees, and each of its submodels."""

    def __init__(self, config: NemotronHVLConfig) -> None:
        super().__init__(config)
        self._submodels: WeakValueDictionary[Budget, NemotronHElasticForConditionalGeneration] = WeakValueDictionary()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NemotronHElasticForConditionalGeneration:
        """As `NemotronHVLForConditionalGeneration.from_pretrained`; then the language model's weights are laid out."""
        model = NemotronHVLForConditionalGeneration.from_pretrained(*args, **kwargs)
        model, *told = model if isinstance(model, tuple) else (model,)  # with output_loading_info
        parent = cls.from_model(model)
        return (parent, *told) if told else parent

    @classmethod
    def from_model(cls, model: NemotronHVLForConditionalGeneration) -> NemotronHElasticForConditionalGeneration:
        """Take over an ordinary model: its weights become this one's.

        Raises:
            ValueError: as `NemotronHElasticForCausalLM.from_model`.
        """
        live = NemotronHElasticForCausalLM.from_model(language_model_of(model))
        return cls._join(model, model.config, live, model.model.multi_modal_projector)

    @classmethod
    def _join(
        cls,
        model: NemotronHVLForConditionalGeneration,
        config: NemotronHVLConfig,
        live: NemotronHElasticForCausalLM,
        projector: nn.Module,
    ) -> NemotronHElasticForConditionalGeneration:
        """A model of the parts of `model`, another language model and projector."""
        with torch.device("meta"):
            joined = cls(config)
        for name, part in model.model.named_children():
            setattr(joined.model, name, part)
        joined.model.multi_modal_projector, joined.model.language_model = projector, live.model
        joined.lm_head = live.lm_head
        if config.text_config.num_nextn_predict_layers:
            joined.mtp = live.mtp
        object.__setattr__(joined, "live", live)  # its modules are here already, under other names
        joined.generation_config, joined.name_or_path = live.generation_config, live.name_or_path
        return joined.train(model.training)

    def submodel(self, budget: Request) -> NemotronHElasticForConditionalGeneration:
        """The complete model of a budget, without gradients; the same object as long as it is referenced.

        Raises:
            ValueError: as `NemotronHElasticForCausalLM.submodel`.
        """
        child = self.live.resolve(budget)
        if child.is_whole():
            return self
        small = self.live.submodel_of(child)
        found = self._submodels.get(child.budget)
        if found is None or found.live is not small:
            config = type(self.config).from_dict({**self.config.to_dict(), "text_config": child.config})
            found = self._submodels[child.budget] = self._join(self, config, small, self._projector(config)).eval()
        return found

    def _projector(self, config: NemotronHVLConfig) -> nn.Module:
        """The parent's, with the first rows of its last matrix."""
        own = self.model.multi_modal_projector
        with torch.device("meta"):
            small = type(own)(config)
        small.layer_norm, small.linear_1 = own.layer_norm, own.linear_1
        self._tie(small)
        return small

    def _tie(self, projector: nn.Module) -> None:
        rows = self.model.multi_modal_projector.linear_2.weight.data[: projector.linear_2.out_features]
        projector.linear_2.weight = nn.Parameter(rows, requires_grad=False)

    def generate(self, inputs: Any = None, *args: Any, budget: Request | None = None, **kwargs: Any) -> Any:
        """As transformers', by the model of `budget`, one for all rows.

        Raises:
            ValueError: for a list of budgets or a schedule, which are for text parents.
        """
        if budget is None:
            return super().generate(inputs, *args, **kwargs)
        if isinstance(budget, (list, tuple, BudgetSchedule)):
            raise ValueError(f"budget={budget!r}: allowed is one budget for all rows of a model that sees")
        return self.submodel(budget).generate(inputs, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, state_dict: dict | None = None, **kwargs: Any) -> None:
        """An ordinary checkpoint of the parent, or of a submodel."""
        with torch.device("meta"):
            ordinary = AutoModelForImageTextToText.from_config(self.config)
        ordinary.generation_config = self.generation_config
        ordinary.save_pretrained(
            save_directory, state_dict=self.state_dict() if state_dict is None else state_dict, **kwargs
        )

    def __getstate__(self) -> dict[str, Any]:
        """As `NemotronHElasticForCausalLM.__getstate__`."""
        return {**vars(self), "_submodels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._submodels = WeakValueDictionary()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.live._apply(fn, recurse)  # its submodels follow
        for small in self._submodels.values():
            self._tie(small.model.multi_modal_projector)
        return self
