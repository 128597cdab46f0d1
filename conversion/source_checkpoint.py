"""A Megatron checkpoint as one lazy mapping: whole tensors under global names, put together from pieces when read.

The readers of the formats say where the pieces of each tensor are; putting them together is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_h_hf.checkpoint import PIECE_BYTES
from nemotron_h_hf.model.weights import TensorSpec, read_into

from . import torchzip
from .unpickle import Extent


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make every ValueError of reading `path` name it."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file of a checkpoint is in its folder, links followed. A snapshot in the hub's cache consists of links to
    `blobs`, next to `snapshots`: those of its own repository count as being in it."""
    file, place = path.resolve(), folder.resolve()
    snapshots = [at.parent for at in (place, *place.parents) if at.parent.name == "snapshots"]
    blobs = [at.parent / "blobs" for at in snapshots if at.parent.name.startswith("models--")]
    return any(file.is_relative_to(at) for at in (place, *blobs))


@dataclass(frozen=True)
class Chunk:
    """A tensor in its own torch.save zip, which starts at `offset` of a file and is `length` bytes long."""

    path: Path
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def extent(self) -> Extent:
        """Open the zip and find the bytes; ValueError when it holds something else than was announced."""
        where = f"{self.path} (bytes {self.offset} to {self.offset + self.length})"
        extent = torchzip.only_tensor(torchzip.read(self.path, self.offset, self.length), where)
        if (extent.dtype, extent.shape) != (self.dtype, self.shape):
            raise ValueError(
                f"{where} holds {extent.dtype} {extent.shape}, the metadata says {self.dtype} {self.shape}"
            )
        return extent


class Piece(NamedTuple):
    """Rows `first` to `first + box[0]` of a stored tensor, and the corner of the whole tensor where they go.

    The stored tensor is seen as rows of `box[1:]`; leading axes (the experts of a stack) are rows as well.
    """

    stored: Extent | Chunk
    first: int
    box: tuple[int, ...]
    corner: tuple[int, ...]


@dataclass
class Entry:
    """One whole tensor: the pieces that make it, and further copies that must be equal."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)
    copies: list[Piece] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        """Names of the files that hold it."""
        return sorted({"/".join(piece.stored.path.parts[-2:]) for piece in self.pieces})


class SourceCheckpoint(Mapping[str, Tensor]):
    """What `read_megatron` gives: a mapping of Megatron's global names to whole tensors, each read when asked for.

    args       the training arguments, as far as the checkpoint has them
    ignored    names that are not weights -> why they are left alone
    stand_ins  classes that the checkpoint's pickles name and that were not loaded
    notes      remarks for the report
    """

    def __init__(self, path: Path, format_name: str, entries: dict[str, Entry], args: dict[str, Any]) -> None:
        self.path, self.format, self.entries, self.args = path, format_name, entries, args
        self.ignored: dict[str, str] = {}
        self.stand_ins: list[str] = []
        self.notes: list[str] = []
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape of the whole tensor, without reading it."""
        entry = self.entries[name]
        return TensorSpec(name, entry.dtype, entry.shape)

    def check_records(self) -> None:
        """Compare the bytes of all weights with the checksums of the zips that they are in; reads them all.

        Raises:
            ValueError: naming the file and the record that is damaged.
        """
        pieces = [piece for entry in self.entries.values() for piece in (*entry.pieces, *entry.copies)]
        offsets: dict[Path, set[int]] = {}
        for stored in {piece.stored for piece in pieces}:
            if isinstance(stored, Chunk):
                torchzip.check_records(stored.path, stored.offset, stored.length)
            elif stored.num_bytes:
                offsets.setdefault(stored.path, set()).add(stored.offset)
        for path, places in offsets.items():
            torchzip.check_records(path, 0, path.stat().st_size, sorted(places))

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for piece in entry.pieces:
            for target, rows in self._rows(piece, whole):
                if rows is not target:
                    target.copy_(rows)
        for piece in entry.copies:
            for target, rows in self._rows(piece, whole, into_whole=False):
                if not torch.equal(target.contiguous().view(torch.uint8), rows.view(torch.uint8)):
                    raise ValueError(
                        f"{name} differs between its copies: {piece.stored.path} disagrees with {entry.sources}"
                    )
        return whole

    def _rows(self, piece: Piece, whole: Tensor, into_whole: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """(where it goes, what was read) for a piece; the same tensor twice when it was read right into its place."""
        box, num_rows = _box(whole, piece)
        extent = piece.stored.extent() if isinstance(piece.stored, Chunk) else piece.stored
        if extent.problem:
            raise ValueError(f"{extent.path}: a tensor of shape {extent.shape} cannot be read: {extent.problem}")
        row_bytes = math.prod(box.shape[1:]) * extent.dtype.itemsize
        direct = into_whole and box.is_contiguous()
        step = num_rows if direct else max(1, PIECE_BYTES // max(row_bytes, 1))
        for start in range(0, num_rows, max(step, 1)):
            target = box[start : start + step]
            rows = target if direct else torch.empty(target.shape, dtype=whole.dtype)
            with open(extent.path, "rb", buffering=0) as file:
                read_into(file, extent.offset + (piece.first + start) * row_bytes, rows)
            self.bytes_read += rows.nbytes
            yield target, rows


def _box(whole: Tensor, piece: Piece) -> tuple[Tensor, int]:
    box = whole if whole.dim() else whole.reshape(1)
    for axis, (start, length) in enumerate(zip(piece.corner, piece.box, strict=True)):
        box = box.narrow(axis, start, length)
    return box, box.shape[0]
