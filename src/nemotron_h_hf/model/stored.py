"""Where each tensor of safetensors files is, from their headers alone, read piece by piece.

stored = find_tensors(["model-00001-of-00002.safetensors", ...])        released name -> Stored
"""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from .loading import DTYPES, released_name
from .reading import read_header

PIECE_BYTES = 4 * 2**20
"""How much is read at once, where a tensor is read in parts."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: bytes from `offset` on in `file`; `dtype` is the format's code, such as BF16."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def find_tensors(files: Iterable[str | os.PathLike]) -> dict[str, Stored]:
    """The tensors of safetensors files under released names (`backbone.`, one matrix per expert)."""
    found: dict[str, Stored] = {}
    for file in map(str, files):
        header = read_header(file)
        data = os.path.getsize(file) - max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file} has {name} in {entry['dtype']}: allowed are {', '.join(DTYPES)}")
            stored = Stored(file, data + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
            found |= _experts_apart(released_name(name), stored)
    return found


def empty_tensors(files: Iterable[str | os.PathLike]) -> dict[str, Tensor]:
    """The tensors of safetensors files under released names, on the meta device: only headers are read."""
    stored = find_tensors(files)
    return {name: torch.empty(it.shape, dtype=DTYPES[it.dtype], device="meta") for name, it in stored.items()}


def read_into(file: BinaryIO, offset: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of an open file from `offset` on."""
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    file.seek(offset)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{file.name} was cut short while it was read: {len(view)} bytes at {offset} are needed")
        done += count


def _experts_apart(name: str, stored: Stored) -> dict[str, Stored]:
    """A tensor that holds all experts (e, rows, columns) as one entry for each, as the released files have them."""
    match = re.fullmatch(r"(.*\.experts)\.(up_proj|down_proj)", name)
    if match is None:
        return {name: stored}
    num_experts, *shape = stored.shape
    size = stored.num_bytes // num_experts
    return {
        f"{match[1]}.{expert}.{match[2]}.weight": Stored(
            stored.file, stored.offset + expert * size, stored.dtype, tuple(shape)
        )
        for expert in range(num_experts)
    }
