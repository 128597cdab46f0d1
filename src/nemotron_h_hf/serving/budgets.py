"""The models that answer: a parent's budgets by the name in a request, as views into one memory image.

    parent                 the parent itself            parent:6b              a budget that its configuration names
    parent:7GiB@32Ki       the best that fits           parent:6b>12b          the first thinks, the second answers

Named budgets stay. Of those asked for by size the last few that nobody uses stay, because making one may copy matrices.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from transformers import PreTrainedModel

from ..cost import cache_bytes, kv_bytes_per_token, num_active_parameters, num_parameters, weight_bytes
from ..elastic.budgets import Budget, read_elastic
from ..elastic.child import Child
from ..elastic.live.parent import NemotronHElasticForCausalLM
from ..elastic.resolve import resolve
from ..model.configuration_nemotron_h import NemotronHConfig

KEPT_BY_SIZE = 4
KEPT_ANSWERS = 1024  # of what requests asked for


class Budgets:
    """All budgets of one model; a model that is no elastic parent has itself alone."""

    def __init__(self, model: PreTrainedModel, name: str = "parent") -> None:
        self.model, self.name = model, name
        self.is_elastic = isinstance(model, NemotronHElasticForCausalLM) and bool(model.config.elastic)
        self.named = dict(read_elastic(model.config).budgets) if self.is_elastic else {}
        self.whole = Child(model.config, Budget(name=""), model.config)
        self._found: OrderedDict[str, Child] = OrderedDict()
        self._models: OrderedDict[Budget, PreTrainedModel] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, request: Any) -> Child:
        """The child that a request names; None and "" are the parent.

        Raises:
            ValueError: as `resolve`, and for any budget of a model that has none.
        """
        if request in (None, ""):
            return self.whole
        if not self.is_elastic:
            raise ValueError(f"budget={request!r}: {self.name} names no budgets: allowed is to leave it out")
        with self._lock:
            key = str(request)
            if key not in self._found:
                child = resolve(self.model.config, request, self.model.dtype)
                same = (it for it in self._found.values() if it.budget == child.budget)
                self._found[key] = self.whole if child.is_whole() else next(same, child)
                while len(self._found) > KEPT_ANSWERS:
                    self._found.popitem(last=False)
            return self._found[key]

    def model_of(self, child: Child, in_use: set[Budget]) -> PreTrainedModel:
        """The model of a child; of those that no name and no row (`in_use`) holds, old ones are let go."""
        if child is self.whole:
            return self.model
        if child.budget not in self._models:
            self._models[child.budget] = self.model.submodel_of(child)
        self._models.move_to_end(child.budget)
        named = set(self.named.values())
        free = [it for it in self._models if it not in named and it not in in_use and it != child.budget]
        for budget in free[: max(0, len(free) - KEPT_BY_SIZE)]:
            del self._models[budget]
        return self._models[child.budget]

    def split(self, model: str) -> tuple[Any, Any]:
        """(budget, budget that answers after thinking) of a model id; None for the parent, and for nothing of its own.

        Raises:
            KeyError: for an id that is not this model's.
        """
        own, colon, rest = model.partition(":")
        if own != self.name or (colon and not rest):
            raise KeyError(model)
        first, arrow, then = rest.partition(">")
        if arrow and not (first and then):
            raise KeyError(model)
        return first or None, then or None

    def label(self, child: Child) -> str:
        """A short name for metrics, of which there are few."""
        return "parent" if child is self.whole else child.name if child.name in self.named else "by size"

    def extra_bytes(self) -> dict[str, int]:
        """Bytes that each live submodel has in addition to its views."""
        return {budget.name: model.shared_bytes()["copies"] for budget, model in list(self._models.items())}

    def image_bytes(self) -> int:
        """Bytes of the parent's tensors."""
        tensors = {t.data_ptr(): t.nbytes for t in [*self.model.parameters(), *self.model.buffers()]}
        return sum(tensors.values())

    def describe(self) -> list[dict[str, Any]]:
        """What `/v1/models` says of each: the parent, then the named budgets."""
        entries = [(self.name, self.whole, None)]
        entries += [(f"{self.name}:{name}", self.find(name), budget) for name, budget in self.named.items()]
        return [{"id": name, **self._facts(child.config, budget)} for name, child, budget in entries]

    def _facts(self, config: NemotronHConfig, budget: Budget | None) -> dict[str, Any]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        facts = {
            "parameters": num_parameters(config), "active_parameters": num_active_parameters(config),
            "bytes": weight_bytes(config, dtype), "cache_bytes_per_token": kv_bytes_per_token(config, dtype),
            "state_bytes": cache_bytes(config, 0, dtype),
        }  # fmt: skip
        return facts if budget is None else {**facts, "loss": budget.loss, "trained": budget.trained}
