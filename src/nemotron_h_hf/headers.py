"""What a checkpoint folder holds, read from its safetensors headers alone: no weight is ever loaded."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .model import reading

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# what safetensors calls each dtype -> what torch calls it
DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file describes it; `dtype` is torch's name where torch has one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str

    @property
    def num_elements(self) -> int:
        """Elements by the shape."""
        return math.prod(self.shape)


@dataclass
class Contents:
    """All tensors of a folder, and what is wrong with its files."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    missing_files: list[str] = field(default_factory=list)
    damaged_files: dict[str, str] = field(default_factory=dict)  # file -> what is wrong with it
    missing_tensors: list[str] = field(default_factory=list)  # in the index, in none of the files read

    @property
    def is_complete(self) -> bool:
        """Whether every file that should be there is, whole."""
        return not (self.missing_files or self.damaged_files or self.missing_tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def elements_by_dtype(self) -> dict[str, int]:
        """Elements of each dtype, the most common first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.num_elements
        return dict(counts.most_common())


def read_contents(folder: str | os.PathLike) -> Contents:
    """Read the headers of a checkpoint folder, sharded or not; damage is collected, not raised.

    Raises `ValueError` when the folder has no safetensors weights at all, or an index that is not one.
    """
    folder = Path(folder)
    if (folder / SINGLE_NAME).is_file():
        weight_map, files = {}, [SINGLE_NAME]
    elif (folder / INDEX_NAME).is_file():
        weight_map = reading.read_index(folder / INDEX_NAME)
        files = sorted(set(weight_map.values()))
    else:
        raise ValueError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    contents = Contents()
    for file in files:
        _read_file(folder, file, contents)
    unread = {*contents.missing_files, *contents.damaged_files}
    contents.missing_tensors = [
        name for name, file in weight_map.items() if name not in contents.tensors and file not in unread
    ]
    return contents


def read_header(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file; `ValueError` names the file if it is damaged or shorter than it says."""
    return {
        name: StoredTensor(
            name=name,
            dtype=DTYPE_NAMES.get(entry["dtype"], entry["dtype"]),
            shape=tuple(entry["shape"]),
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            file=Path(path).name,
        )
        for name, entry in reading.read_header(path).items()
    }


def _read_file(folder: Path, file: str, contents: Contents) -> None:
    if not (folder / file).is_file():
        contents.missing_files.append(file)
        return
    try:
        contents.tensors.update(read_header(folder / file))
    except ValueError as error:
        contents.damaged_files[file] = str(error)
