"""Writes sharded safetensors checkpoints, one tensor at a time.

Writing takes the list of what will come, because a safetensors file begins with the offsets of all its tensors, and then
the tensors in that order:

    source = Checkpoint("path/to/model")                                    (model/weights.py)
    specs = [source.spec(name) for name in source]
    save("path/to/copy", specs, ((name, source[name]) for name in source), max_shard_bytes=5 * 2**30)

A file is written under a temporary name, flushed to the disk and renamed, so a file with its final name is whole. The
index comes last. Peak memory is one tensor and a few pieces of `PIECE_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .model.weights import DTYPES, INDEX_NAME, SINGLE_NAME, TensorSpec, byte_view
from .whole_files import whole_file, write_text

PIECE_BYTES = 16 * 2**20
WORTH_A_THREAD_BYTES = 2**20

CODES = {dtype: code for code, dtype in DTYPES.items()}


class Digest(NamedTuple):
    """Checksum and counts of a tensor that was written."""

    sha256: str
    num_nan: int
    num_inf: int


def pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor as flat pieces of about `PIECE_BYTES`, each cast to `dtype`."""
    flat = tensor.reshape(-1)
    for piece in flat.split(PIECE_BYTES // dtype.itemsize):
        yield piece.to(dtype)


class Digester:
    """Checksum and counts of NaN and infinity of one tensor that comes in pieces; runs while others are written."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool, self.hash, self.num_nan, self.num_inf = pool, hashlib.sha256(), 0, 0
        self.last = None

    def add(self, piece: Tensor) -> None:
        """Take the next piece; waits for the one before it, which keeps at most two alive."""
        if self.last is not None:
            self.last.result()
            self.last = None
        if piece.nbytes < WORTH_A_THREAD_BYTES:
            self._digest(piece)
        else:
            self.last = self.pool.submit(self._digest, piece)

    def result(self) -> Digest:
        """What was seen of all pieces."""
        if self.last is not None:
            self.last.result()
        return Digest(self.hash.hexdigest(), self.num_nan, self.num_inf)

    def _digest(self, piece: Tensor) -> None:
        self.hash.update(byte_view(piece))
        if not piece.is_floating_point() or piece.numel() == 0:
            return
        values = piece if piece.dtype.itemsize > 1 else piece.to(torch.float32)
        low, high = torch.aminmax(values)  # NaN anywhere gives NaN here: one pass is enough in the usual case
        if not (torch.isfinite(low) and torch.isfinite(high)):
            self.num_nan += int(values.isnan().sum())
            self.num_inf += int(values.isinf().sum())


class ShardWriter:
    """Writes one safetensors file: the tensors of `specs`, in their order; it gets its name when it is whole.

    Use as a context manager; an exception inside leaves nothing.
    """

    def __init__(
        self, path: str | os.PathLike, specs: Sequence[TensorSpec], metadata: dict[str, str] | None = None
    ) -> None:
        self.path, self.specs = Path(path), list(specs)
        self.metadata = {"format": "pt", **(metadata or {})}
        self.digests: dict[str, Digest] = {}

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            part = stack.enter_context(whole_file(self.path, only_writer=True))
            self.file = stack.enter_context(open(part, "wb", buffering=0))
            self.pool = stack.enter_context(ThreadPoolExecutor(1))
            _write_all(self.file, memoryview(_header(self.specs, self.metadata)))
            self.stack = stack.pop_all()
        return self

    def write(self, name: str, tensor: Tensor, progress: Callable[[int], object] | None = None) -> Digest:
        """Write the next tensor, cast to the announced dtype; `progress` is called with the bytes of each piece."""
        spec = self.specs[len(self.digests)]
        if name != spec.name or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit the announced {spec.name} {spec.shape}")
        digester = Digester(self.pool)
        for piece in pieces(tensor, spec.dtype):
            digester.add(piece)
            _write_all(self.file, byte_view(piece))
            if progress is not None:
                progress(piece.nbytes)
        self.digests[name] = digester.result()
        return self.digests[name]

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        with self.stack:
            if error is not None:
                raise error
            if len(self.digests) != len(self.specs):
                raise ValueError(
                    f"{self.path.name}: {len(self.digests)} of {len(self.specs)} announced tensors were written"
                )


def _write_all(file, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def _header(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for spec in specs:
        if spec.dtype not in CODES:
            raise ValueError(f"dtype={spec.dtype} of {spec.name}: allowed are {', '.join(map(str, CODES))}")
        if spec.name in entries:
            raise ValueError(f"{spec.name} is announced twice")
        offsets = [end, end + spec.num_bytes]
        entries[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        end += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def plan_shards(groups: Iterable[Sequence[TensorSpec]], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors. A group (tensors made together) stays in one file; one alone may exceed the limit."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: allowed is a positive number of bytes")
    shards: list[list[TensorSpec]] = []
    room = 0
    for group in groups:
        num_bytes = sum(spec.num_bytes for spec in group)
        if not shards or num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].extend(group)
        room -= num_bytes
    if len(shards) < 2:
        return {SINGLE_NAME: shards[0] if shards else []}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(folder: str | os.PathLike, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    """Write the index of several shards; one file needs none."""
    if set(shards) == {SINGLE_NAME}:
        return
    specs = {spec.name: (file, spec) for file, shard in shards.items() for spec in shard}
    metadata = {
        "total_size": sum(spec.num_bytes for _, spec in specs.values()),
        "total_parameters": sum(spec.num_elements for _, spec in specs.values()),
    }
    index = {"metadata": metadata, "weight_map": {name: file for name, (file, _) in sorted(specs.items())}}
    write_text(Path(folder) / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def save(
    folder: str | os.PathLike,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = 5 * 2**30,
) -> dict[str, Digest]:
    """Write tensors, which come in the order of `specs`, as a sharded checkpoint; what was seen of each.

    Raises:
        ValueError: when the folder has weights already, or a tensor does not fit its announcement.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds safetensors files already; remove them or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(([spec] for spec in specs), max_shard_bytes)
    stream = iter(tensors)
    digests: dict[str, Digest] = {}
    for file, shard in shards.items():
        with ShardWriter(folder / file, shard) as writer:
            for _ in shard:
                writer.write(*next(stream))
        digests |= writer.digests
    if next(stream, None) is not None:
        raise ValueError(f"more tensors came than the {len(specs)} that were announced")
    write_index(folder, shards)
    return digests
