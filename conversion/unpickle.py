"""Reads a pickle without running any of it: an allow-list of plain values, an inert stand-in for every other class.

A pickle is a program that may call any function it can name. Here a name gives one of three things: a plain value type
(`OrderedDict`, `torch.bfloat16`, a size), a function of ours that only notes what a tensor would be, or `StandIn`, a
class that ignores its arguments. Nothing that the file names is imported, so nothing that it names can run.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "bool",
    )
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "Float8_e4m3fnStorage": "float8_e4m3fn",
    "Float8_e5m2Storage": "float8_e5m2",
}  # fmt: skip


class StandIn:
    """What an unknown class becomes: it takes any argument and any state, and does nothing with them."""

    global_name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Swallow an item."""

    def extend(self, items: Any) -> None:
        """Swallow items."""

    def add(self, item: Any) -> None:
        """Swallow an item."""

    def __repr__(self) -> str:
        return f"<stand-in for {self.global_name}>"


@dataclass(frozen=True)
class Extent:
    """A tensor as bytes of a file: `shape` elements of `dtype` from byte `offset` on, row after row."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    problem: str = ""  # why it cannot be read as such, if it cannot

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Storage:
    """One record of a torch file: the bytes that tensors are cut from."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype


FindStorage = Callable[[Any], Storage]


def load(file: IO[bytes], source: str, find_storage: FindStorage | None = None) -> tuple[Any, list[str]]:
    """Read one pickle; also the names of all classes and functions that became stand-ins.

    Tensors come as `Extent`. Raises ValueError naming `source` when the pickle is damaged.
    """
    reader = _Reader(file, find_storage)
    try:
        value = reader.load()
    except (
        pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError,
        RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise ValueError(f"{source} is not a readable pickle: {type(error).__name__}: {error}") from None
    return value, sorted(reader.stand_ins)


class _Reader(pickle.Unpickler):
    def __init__(self, file: IO[bytes], find_storage: FindStorage | None) -> None:
        super().__init__(file, encoding="utf-8")
        self.find_storage = find_storage
        self.stand_ins: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return DTYPES[STORAGES[name]]
        if full not in self.stand_ins:
            self.stand_ins[full] = type("StandIn", (StandIn,), {"global_name": full})
        return self.stand_ins[full]

    def persistent_load(self, pid: Any) -> Storage:
        if self.find_storage is None:
            raise pickle.UnpicklingError(f"it refers to something outside of itself: {pid!r:.80}")
        return self.find_storage(pid)


def _rebuild_tensor(
    storage: Storage, first: int, shape: tuple, stride: tuple, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> Extent:
    return _extent(storage, storage.dtype, first, shape, stride)


def _rebuild_tensor_of_dtype(
    storage: Storage, first: int, shape: tuple, stride: tuple, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Extent:
    return _extent(storage, dtype, first, shape, stride)


def _extent(storage: Storage, dtype: torch.dtype, first: int, shape: tuple, stride: tuple) -> Extent:
    shape, stride = tuple(shape), tuple(stride)
    if not all(isinstance(n, int) and n >= 0 for n in (first, *shape, *stride)) or len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape} and strides {stride} from element {first}")
    last = first + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.num_bytes:
        raise ValueError(f"a tensor of shape {shape} needs element {last} of a storage of {storage.num_bytes} bytes")
    problem = "" if _is_contiguous(shape, stride) else f"it is stored with strides {stride}, not row after row"
    return Extent(storage.path, storage.offset + first * dtype.itemsize, dtype, shape, problem)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return 0 in shape
        expected *= n
    return True


class _Names(StandIn):
    """argparse.Namespace: only its attributes matter."""

    global_name = "argparse.Namespace"


ALLOWED: dict[str, Any] = {
    "argparse.Namespace": _Names,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
}
