"""How much each channel, neuron, head and expert matters, from activations on calibration text; no gradients are needed.

    scores = WidthScores.empty()
    for _ in accumulate(model, batches, scores): ...        # a batch at a time; save and load `scores` to continue later
    importance = importance_of(model.config, scores)
    order = importance_order(model.config, importance)       # a `Kept` of everything, the most important first

Every score is built from one statistic of an activation a, where the outer sum is over the rows (sequences) of text:

    A = sqrt(sum over rows (mean over the row's tokens |a|)^2)                                                        (1)

    hidden           sum over all norms of A(the norm's output)
    neurons          A(input of down_proj), behind the activation; likewise shared_neurons. Of an MLP's on request A(output
                     of up_proj), before it
    expert_neurons   the same of each expert, 0 for tokens that were not sent to it
    channels         A(the x part of in_proj's output), of each head's own channels
    heads            L2 norm of the head's channels
    query_heads      L2 norm over the head's channels of A(input of o_proj)
    experts          A(weight * |expert's output|_2), 0 for tokens that were not sent to it

These are the formulas that NVIDIA's pruning tool runs (Model Optimizer, mcore_minitron) and not those printed in Nemotron
Elastic (arXiv 2511.16664, eq. 1-4), for two reasons: the paper scores neurons before the activation, where a squared ReLU
drops the negative half, and sums signed values over tokens for Mamba, where they cancel. Two things differ from the tool:
channels are ranked within each head rather than once for all heads, which is as exact and freer; and experts, for which it
has no published formula here, are scored by what leaves the output with them (REAP's product, averaged over all tokens and
not over the expert's own, which makes rarely used experts count for less).

Activations are reduced where they occur: what is kept is one number per channel and row of the batch.

    b rows, l tokens of a row, t = b l tokens, d hidden, f neurons, h heads, p head channels, a query heads, e experts,
    w neurons of an expert, k experts per token
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..inputs import open_tensors
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.linear import multiply
from ..slicing import Kept, everything
from ..tensors import AXES, axes_of, num_groups
from ..whole_files import whole_file

FORMAT = "nemotron_h_hf.width_scores.v1"


@dataclass
class WidthScores:
    """Sums over rows of (mean over tokens |a|)^2, fp64, by place ("neurons.3"); `num_rows` rows went in."""

    sums: dict[str, Tensor]
    num_rows: int

    @classmethod
    def empty(cls) -> WidthScores:
        """Before the first row."""
        return cls({}, 0)

    def statistic(self, place: str) -> Tensor:
        """Equation (1), fp64."""
        return self.sums[place].sqrt()

    def save(self, path: str | os.PathLike, fingerprint: str) -> None:
        """Write the sums, whole or not at all; `fingerprint` says which model and text they are of."""
        metadata = {"format": FORMAT, "num_rows": str(self.num_rows), "fingerprint": fingerprint}
        with whole_file(path) as part:
            save_file(self.sums, part, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, fingerprint: str) -> WidthScores:
        """What `save` wrote; none yet if there is no such file.

        Raises:
            ValueError: if the file holds something else, or scores of another model or text.
        """
        if not Path(path).exists():
            return cls.empty()
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a file of scores: its format is {metadata.get('format')!r}")
            if metadata["fingerprint"] != fingerprint:
                raise ValueError(f"{path} has scores of another model or other text; remove it to begin again")
            return cls({name: file.get_tensor(name) for name in file.keys()}, int(metadata["num_rows"]))


@dataclass
class Importance:
    """Scores, fp64, the larger the more important; the mappings are by layer, as in `Kept`."""

    hidden: Tensor  # (d)
    neurons: dict[int, Tensor] = field(default_factory=dict)  # (f)
    heads: dict[int, Tensor] = field(default_factory=dict)  # (h)
    channels: dict[int, Tensor] = field(default_factory=dict)  # (h, p)
    query_heads: dict[int, Tensor] = field(default_factory=dict)  # (a)
    experts: dict[int, Tensor] = field(default_factory=dict)  # (e)
    expert_neurons: dict[int, Tensor] = field(default_factory=dict)  # (e, w)
    shared_neurons: dict[int, Tensor] = field(default_factory=dict)  # (s)


@torch.no_grad()
def accumulate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], scores: WidthScores, before_activation: bool = False
) -> Iterator[int]:
    """Run batches through a NemotronHForCausalLM and add them to `scores`; yields the rows done after each.

    A batch is what the model takes: `input_ids` (b, l) without padding, and perhaps `position_ids` of packed documents.
    The routed experts are computed twice, as their outputs cannot be seen from outside. The model is left as it was.
    """
    with _watched(model, before_activation) as seen:
        for batch in batches:
            rows, length = batch["input_ids"].shape
            seen.begin(rows)
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
            model.model(**inputs, use_cache=False)
            for place, total in seen.totals.items():
                added = (total / length).square().sum(0).cpu()
                scores.sums[place] = scores.sums[place] + added if place in scores.sums else added
            scores.num_rows += rows
            yield scores.num_rows


def importance_of(config: NemotronHConfig, scores: WidthScores) -> Importance:
    """The scores of every axis, from the statistics of every place."""
    norms = [scores.statistic(place) for place in scores.sums if place.startswith("norm.")]
    found = Importance(torch.stack(norms).sum(0))
    for index, kind in enumerate(config.layers_block_type):
        for axis in axes_of(kind):
            if axis.name not in ("heads", "key_value_heads"):
                getattr(found, axis.name)[index] = scores.statistic(f"{axis.name}.{index}")
    found.heads = {index: values.norm(dim=1) for index, values in found.channels.items()}
    found.query_heads = {index: values.norm(dim=1) for index, values in found.query_heads.items()}
    return found


def importance_order(config: NemotronHConfig, importance: Importance) -> Kept:
    """Everything, the most important first inside its group: every budget is a prefix.

    The layers of multi-token prediction, which no forward runs, keep their own order.
    """
    kept = everything(config)
    orders = {axis.name: dict(getattr(kept, axis.name)) for axis in AXES if axis.kind}
    for axis in AXES:
        own = axis.kind not in (None, "full_attention")
        for index, values in getattr(importance, axis.name).items() if own else ():
            order = descending_in_groups(values, num_groups(config, axis.field))
            orders[axis.name][index] = order[orders[axis.within][index]] if axis.within else order
    for index, values in importance.query_heads.items():
        groups = values.view(config.num_key_value_heads, -1)
        order = orders["key_value_heads"][index] = _descending(groups.norm(dim=1))
        orders["query_heads"][index] = descending_in_groups(values, len(groups)).view_as(groups)[order].flatten()
    return Kept(kept.layers, _descending(importance.hidden), **orders)


def descending_in_groups(values: Tensor, num_groups: int) -> Tensor:
    """Indices of (..., n) values, group after group, the largest of each group first."""
    groups = values.unflatten(-1, (num_groups, -1))
    return (_descending(groups) + torch.arange(num_groups)[:, None] * groups.shape[-1]).flatten(-2)


def _descending(values: Tensor) -> Tensor:
    return values.argsort(dim=-1, descending=True, stable=True)


class _Seen:
    """Sums over tokens of |a| in the current batch: place -> (b, ...) fp64. A long batch may come in several parts."""

    def __init__(self) -> None:
        self.rows, self.totals = 0, {}

    def begin(self, rows: int) -> None:
        self.rows, self.totals = rows, {}

    def add(self, place: str, activation: Tensor) -> None:
        """activation (b, l, ...)"""
        self.add_sum(place, activation.abs().sum(1, dtype=torch.float64))

    def add_sum(self, place: str, total: Tensor) -> None:
        self.totals[place] = self.totals[place] + total if place in self.totals else total


@contextmanager
def _watched(model: nn.Module, before_activation: bool) -> Iterator[_Seen]:
    """Hooks on everything that is scored."""
    seen = _Seen()

    def output(place: str, shape: Callable[[Tensor], Tensor] = lambda x: x) -> Callable:
        return lambda module, args, result: seen.add(place, shape(result))

    def input_(place: str, shape: Callable[[Tensor], Tensor] = lambda x: x) -> Callable:
        return lambda module, args: seen.add(place, shape(args[0]))

    with ExitStack() as stack:
        stack.enter_context(model.model.norm_f.register_forward_hook(output("norm.final")))
        for index, block in enumerate(model.model.layers):
            mixer = block.mixer
            stack.enter_context(block.norm.register_forward_hook(output(f"norm.{index}")))
            if block.block_type == "mlp" and before_activation:
                hooks = [mixer.up_proj.register_forward_hook(output(f"neurons.{index}"))]
            elif block.block_type == "mlp":
                hooks = [mixer.down_proj.register_forward_pre_hook(input_(f"neurons.{index}"))]
            elif block.block_type == "linear_attention":
                hooks = [mixer.in_proj.register_forward_hook(output(f"channels.{index}", partial(_x_part, mixer)))]
            elif block.block_type == "full_attention":
                heads = partial(_per_head, mixer.head_dim)
                hooks = [mixer.o_proj.register_forward_pre_hook(input_(f"query_heads.{index}", heads))]
            else:
                shared = mixer.shared_experts.down_proj
                hooks = [shared.register_forward_pre_hook(input_(f"shared_neurons.{index}"))]
                hooks += [mixer.experts.register_forward_pre_hook(partial(_see_experts, seen, index))]
            for hook in hooks:
                stack.enter_context(hook)
        yield seen


def _x_part(mixer: nn.Module, projected: Tensor) -> Tensor:
    """(b, l, gate + x + B + C + dt) -> (b, l, h, p)."""
    inner = mixer.intermediate_size
    return projected[..., inner : 2 * inner].unflatten(-1, (mixer.num_heads, mixer.head_dim))


def _per_head(head_dim: int, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


def _see_experts(seen: _Seen, index: int, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
    """What each expert does with the tokens sent to it: tokens (t, in), indices and weights (t, k)."""
    tokens, indices, weights = args
    num_experts, width = experts.up_proj.shape[:2]
    norms = torch.zeros(seen.rows, num_experts, dtype=torch.float64, device=tokens.device)
    neurons = torch.zeros(seen.rows, num_experts, width, dtype=torch.float64, device=tokens.device)
    row_of = torch.arange(len(tokens), device=tokens.device) // (len(tokens) // seen.rows)
    for expert in indices.unique().tolist():
        chosen, slot = (indices == expert).nonzero(as_tuple=True)
        hidden = experts.act_fn(multiply(tokens[chosen], experts.up_proj[expert], None))
        output = multiply(hidden, experts.down_proj[expert], None)
        weighted = output.norm(dim=-1, dtype=torch.float64) * weights[chosen, slot]
        norms[:, expert].index_add_(0, row_of[chosen], weighted)
        neurons[:, expert].index_add_(0, row_of[chosen], hidden.abs().double())
    seen.add_sum(f"experts.{index}", norms)
    seen.add_sum(f"expert_neurons.{index}", neurons)
