"""The tensors of a submodel: views of its parent's if the kept part is a prefix there, otherwise copies.

A view starts where the parent's tensor starts, and is the parent's as long as both have one address. Copies
remember the version of their source, and are made again when a training step has changed it.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from ...model.weights import read_name
from ..child import Child
from .ordered_linear import OrderedLinear


@dataclass
class Tie:
    """One tensor of a submodel, `name` in both modules: the first `shape` of the parent's, or `kept` of each dimension, copied."""

    path: str
    own: nn.Module
    source: nn.Module
    name: str
    shape: list[int]
    kept: list[Tensor | None] | None
    tied: nn.Module | None = None  # lm_head, where it has the embeddings' weight
    version: int = 0

    def tie(self) -> None:
        """Take the view, or the copy, from the source as it is now."""
        live = tensor_of(self.source, self.name)
        taken = live.detach()
        if self.kept is None:
            taken = taken[tuple(slice(0, size) for size in self.shape)]
        else:
            for dim, kept in enumerate(self.kept):
                taken = taken if kept is None else taken.index_select(dim, kept.to(taken.device))
            taken = taken.clone() if taken.data_ptr() == live.data_ptr() else taken
            self.version = version_of(live)
        if self.name in self.own._parameters:
            taken = nn.Parameter(taken, requires_grad=False)
        setattr(self.own, self.name, taken)
        if self.tied is not None:
            setattr(self.tied, self.name, taken)
        if isinstance(self.own, OrderedLinear):
            for gather in self.own.children():
                gather.to(taken.device)

    def tensor(self) -> Tensor:
        """The submodel's tensor."""
        return tensor_of(self.own, self.name)

    def check(self) -> bool:
        """Whether the tensor is still the parent's; copies are made again if they are out of date."""
        live, own = tensor_of(self.source, self.name), self.tensor()
        if self.kept is None:
            return live.data_ptr() == own.data_ptr()
        if live.device != own.device or live.dtype != own.dtype:
            return False
        if self.version != version_of(live):
            self.tie()
        return True


def tie_tensors(parent: nn.Module, small: nn.Module, child: Child) -> list[Tie]:
    """Give a submodel on the meta device its tensors; where each of them comes from."""
    ties = []
    for path, group in groupby(child.cuts(), key=lambda cut: read_name(cut.name).module):
        cut, *others = group
        own, name = find(small, path)
        source, _ = find(parent, read_name(cut.source).module)
        indices = [cut.rows, cut.columns]
        if read_name(cut.source).expert is not None:
            numbers = [read_name(one.source).expert for one in (cut, *others)]
            indices = [torch.tensor(numbers, device="cpu"), *indices]
        tied = small.lm_head if small.config.tie_word_embeddings and own is small.model.embeddings else None
        ties.append(_tie_one(path, own, source, name, indices[: tensor_of(own, name).dim()], tied))
    return ties


def find(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and its name there."""
    place, _, name = path.rpartition(".")
    return model.get_submodule(place), name


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer of a module."""
    held = module._parameters if name in module._parameters else module._buffers
    return held[name]


def version_of(tensor: Tensor) -> int:
    """Counts changes in place; tensors made under inference mode do not count theirs."""
    return -1 if tensor.is_inference() else tensor._version


def _tie_one(
    path: str, own: nn.Module, source: nn.Module, name: str, indices: list[Tensor | None], tied: nn.Module | None
) -> Tie:
    """Work out whether `indices` (in the ordinary order) are a prefix in the source's own order, and take them."""
    live = tensor_of(source, name)
    ordered = isinstance(source, OrderedLinear)
    if ordered:
        places = [source.rows(), source.places_of_inputs()]
        indices = [_in_order(index, place) for index, place in zip(indices, places)]
    sizes = [full if index is None else int(index.max()) + 1 for index, full in zip(indices, live.shape)]
    unused = [0 if index is None else size - len(index) for index, size in zip(indices, sizes)]
    shared = not any(unused[1:]) and unused[0] <= (source.front if ordered else 0)
    if ordered and name == "weight":
        own.front = source.front if shared else 0
        own.set_order(*[index if shared else None for index in indices], live.device)
    elif ordered:  # a bias is in the order of its weight
        shared = shared and own.outputs is not None or indices[0] is None
    else:
        shared = shared and all(index is None or _is_range(index) for index in indices)
    tie = Tie(path, own, source, name, sizes + list(live.shape[len(sizes) :]), None if shared else indices, tied)
    tie.tie()
    return tie


def _in_order(index: Tensor | None, place: Tensor | None) -> Tensor | None:
    """The places of the ordinary rows `index` in a reordered tensor; None for all, unchanged."""
    if place is None:
        return index
    return place.cpu() if index is None else place.cpu()[index]


def _is_range(index: Tensor) -> bool:
    return torch.equal(index, torch.arange(len(index), device=index.device))
