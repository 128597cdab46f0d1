"""Reads a child out of its parent's files: the parent is never built, and little of what is cut away is read.

transformers loads a mapping from names to lazy slices; here each slice is a `PendingCut`, which reads its tensor when it is
indexed. Rows that are cut away are not read. Columns are spread over the whole file, so rows are read whole, a piece at a time,
and cut. In addition to the small tensor each thread holds `PIECE_BYTES`, or one row if that is more.

    pending = ChildFiles(child).tensors(["model-00001-of-00002.safetensors", ...])     name -> PendingCut, in released names
    tensor = pending["lm_head.weight"][...]
"""

import math
import os
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.loading import HUB_ARGUMENTS, check_folder
from ..model.weights import PIECE_BYTES, Stored, find_tensors, read_into
from ..slicing import Cut, runs
from ..tensors import checkpoint_tensors
from .child import Child
from .resolve import Request, resolve

logger = logging.get_logger(__name__)

# Those of the loading, not of the parent's config.
PRECISION_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")


def find_child(
    config_class: type[NemotronHConfig], path: str | os.PathLike | None, budget: Request, arguments: dict[str, Any]
) -> tuple[Child, dict[str, Any]]:
    """The child that a budget asks for, and the arguments of `from_pretrained` that load it."""
    if path is None:
        raise ValueError(f"budget={budget!r} without a checkpoint: allowed is a folder or hub id of the parent")
    check_folder(path, arguments)
    config = arguments.get("config")
    if not isinstance(config, NemotronHConfig):
        left = ("config", *PRECISION_ARGUMENTS)
        changes = {name: value for name, value in arguments.items() if name not in left}
        loaded, rest = config_class.from_pretrained(config or path, return_unused_kwargs=True, **changes)
        again = (*HUB_ARGUMENTS, *PRECISION_ARGUMENTS)
        arguments = {**rest, **{name: value for name, value in arguments.items() if name in again}}
        config = loaded
    dtype = arguments.get("dtype", arguments.get("torch_dtype"))
    child = resolve(config, budget, None if dtype == "auto" else dtype)
    return child, {**arguments, "config": child.config}


class ChildFiles:
    """A child's tensors in its parent's files.

    Raises:
        ValueError: for quantised weights, or files that are not the parent's.
    """

    def __init__(self, child: Child) -> None:
        if "quantization_config" in child.parent.to_dict():
            raise ValueError(
                f"budget={child.name!r} of quantised weights: allowed is a parent in its own precision; cut first, "
                "quantise the small model after"
            )
        self.child = child
        self.bytes_read = 0
        self.parent_bytes = 0
        self._lock = threading.Lock()
        self._own = _Own()

    def tensors(self, files: Iterable[str | os.PathLike]) -> dict[str, "PendingCut"]:
        """Every tensor of the small model by its released name, in the order of its depth; nothing is read yet."""
        stored = find_tensors(files)
        check_tensors(stored, self.child.parent)
        self.parent_bytes = sum(entry.num_bytes for entry in stored.values())
        return {cut.name: PendingCut(self, stored[cut.source], cut) for cut in self.child.cuts()}

    def piece(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor to read into, in the memory of this thread's last one: a fresh buffer per tensor would fragment the heap."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._own.memory.numel() < num_bytes:
            self._own.memory = torch.empty(max(num_bytes, PIECE_BYTES), dtype=torch.uint8)
        return self._own.memory[:num_bytes].view(dtype).view(shape)

    def report(self) -> None:
        """Say how much of the parent was read."""
        logger.info(
            f"budget {self.child.name!r}: read {self.bytes_read:,} of the parent's {self.parent_bytes:,} bytes of weights"
        )

    def count(self, num_bytes: int) -> None:
        """Add to `bytes_read`; transformers reads in several threads."""
        with self._lock:
            self.bytes_read += num_bytes


class _Own(threading.local):
    """What each thread reads into."""

    memory = torch.empty(0, dtype=torch.uint8)


class PendingCut:
    """One tensor of the small model, read each time it is indexed; the methods are those of a slice of safetensors."""

    def __init__(self, files: ChildFiles, stored: Stored, cut: Cut) -> None:
        self.files, self.stored, self.cut = files, stored, cut

    def get_shape(self) -> list[int]:
        return list(self.cut.shape)

    def get_dtype(self) -> str:
        return self.stored.code

    @property
    def dtype(self) -> torch.dtype:
        """Torch's."""
        return self.stored.dtype

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]

    def read(self) -> Tensor:
        """The whole small tensor."""
        cut, shape = self.cut, self.stored.shape
        output = torch.empty(cut.shape, dtype=self.dtype)
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        most_rows = max(1, PIECE_BYTES // max(1, row_bytes))
        done = 0
        with open(self.stored.file, "rb", buffering=0) as file:
            for start, stop in [(0, shape[0])] if cut.rows is None else runs(cut.rows):
                for first in range(start, stop, most_rows):
                    last = min(first + most_rows, stop)
                    target = output[done : done + last - first]
                    whole = cut.columns is None
                    piece = target if whole else self.files.piece((last - first, *shape[1:]), self.dtype)
                    read_into(file, self.stored.offset + first * row_bytes, piece)
                    self.files.count(piece.nbytes)
                    if not whole:
                        torch.index_select(piece, 1, cut.columns, out=target)
                    done += last - first
        return output


def check_tensors(stored: dict[str, Stored], config: NemotronHConfig) -> None:
    """Raise a ValueError unless the files hold what `config` asks for, in those shapes, and nothing else."""
    wanted = {place.released: tensor.shape for tensor in checkpoint_tensors(config) for place in tensor.places()}
    for name, shape in wanted.items():
        if name not in stored:
            raise ValueError(f"the files lack {name}, which the parent's config asks for")
        if stored[name].shape != shape:
            raise ValueError(f"{name} has shape {stored[name].shape}, the parent's config asks for {shape}")
    if left_over := sorted(set(stored) - set(wanted)):
        raise ValueError(f"the files have {left_over[0]}, for which the parent's config has no place")
