"""One pass of a model over a batch, seen from inside: what enters each block, with which arguments, and what leaves the last norm.

With it any stretch of blocks runs again from any state: without a layer, with a narrower one, or those of a nested model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Pass:
    """Of L blocks over (b, l) tokens."""

    states: list[Tensor] = field(default_factory=list)  # (b, l, hidden) before each block, and before the last norm
    arguments: list[dict[str, Any]] = field(default_factory=list)  # of each block: masks and documents of the batch
    hidden: Tensor | None = None  # (b, l, hidden), behind the last norm

    def run(self, block: nn.Module, index: int, state: Tensor) -> Tensor:
        """A block in the place of block `index`, on this batch."""
        return block(state, **self.arguments[index])


@torch.no_grad()
def observe(model: nn.Module, batch: Mapping[str, Tensor], keep_states: bool = True) -> Pass:
    """Run a NemotronHForCausalLM without its head; `batch` has input_ids (b, l), perhaps position_ids, and no padding."""
    seen = Pass()

    def before(index: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.arguments.append({name: value for name, value in kwargs.items() if name != "cache"})
        if keep_states:
            seen.states.append(args[0])

    stack = model.model
    hooks = [
        block.register_forward_pre_hook(partial(before, index), with_kwargs=True)
        for index, block in enumerate(stack.layers)
    ]
    if keep_states:
        hooks.append(stack.norm_f.register_forward_pre_hook(lambda norm, args: seen.states.append(args[0])))
    try:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
        seen.hidden = stack(**inputs, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return seen
