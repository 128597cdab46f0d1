"""vLLM's Nemotron-H of a budget: each tensor of the parent is cut while it is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM

from .vllm import cut


class BudgetNemotronHForCausalLM(NemotronHForCausalLM):
    """As vLLM's, from a parent's files."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM's, of what the budget keeps."""
        child = self.config.child()
        return super().load_weights(weights if child is None else cut(weights, child))
