"""torch.save's file format, read and written in pieces: a zip of one pickle and one uncompressed record per tensor.

    NAME/data.pkl     the object, with each tensor a reference (key, dtype, count) to a record
    NAME/data/KEY     the bytes of one storage, uncompressed, aligned to 64
    NAME/version      "3"

Reading gives `Extent`s, so no tensor is touched; writing takes the object with `Later`s in place of tensors and then
the tensors one at a time. A zip may be a range of a larger file: `.distcp` files are such ranges one after another.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from . import unpickle
from .unpickle import STORAGES, Extent, Storage

MAX_PICKLE_BYTES = 2**30
PIECE_BYTES = 2**20
ALIGNMENT = 64
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class Window(io.RawIOBase):
    """A range of an open file as its own file; writing may continue past its end."""

    def __init__(self, file: IO[bytes], start: int, length: int = 0) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if self.position < 0:
            raise OSError("seek before the start")
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(self.length - self.position, 0)
        self.file.seek(self.start + self.position)
        data = self.file.read(left if size is None or size < 0 else min(size, left))
        self.position += len(data)
        return data

    def write(self, data: Any) -> int:
        if self.file.closed:  # a zip that was given up writes its end when it is collected
            return len(data)
        self.file.seek(self.start + self.position)
        count = self.file.write(data)
        self.position += count
        self.length = max(self.length, self.position)
        return count


@dataclass
class TorchFile:
    """What a torch.save file holds: the object with `Extent`s for tensors, and the names that became stand-ins."""

    value: Any
    stand_ins: list[str]


def read(path: Path, start: int = 0, length: int | None = None) -> TorchFile:
    """Read the object of a torch.save zip that is at bytes `start` to `start + length` of a file.

    Raises:
        ValueError: naming the file, when it is cut short, damaged, compressed or of another kind.
    """
    size = os.path.getsize(path)
    length = size - start if length is None else length
    if start < 0 or length < 0 or start + length > size:
        raise ValueError(f"{path} is cut short: bytes {start} to {start + length} are needed, it has {size}")
    where = str(path) if start == 0 and length == size else f"{path} (bytes {start} to {start + length})"
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(Window(file, start, length))
        except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
            raise ValueError(f"{where} is not a torch.save zip, or is cut short: {error}") from None
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"{where} holds {len(pickles)} data.pkl; a torch.save zip holds one")
        folder = pickles[0].removesuffix("data.pkl")
        for info in records.values():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"{where}: record {info.filename} is compressed or encrypted, torch writes neither")
        window = Window(file, start, length)
        if folder + "byteorder" in records and _bytes(window, records[folder + "byteorder"], where) != b"little":
            raise ValueError(f"{where} is not little-endian")
        text = _bytes(window, records[pickles[0]], where)

        def find_storage(pid: Any) -> Storage:
            if not (
                isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], torch.dtype)
            ):
                raise ValueError(f"a reference that is no storage: {pid!r:.80}")
            info = records.get(f"{folder}data/{pid[2]}")
            if info is None:
                raise ValueError(f"storage {pid[2]!r:.40} is missing")
            if not isinstance(pid[4], int) or pid[4] * pid[1].itemsize > info.file_size:
                raise ValueError(
                    f"storage {pid[2]} should hold {pid[4]} elements, its record has {info.file_size} bytes"
                )
            return Storage(path, start + _data_start(window, info, where), info.file_size, pid[1])

        return TorchFile(*unpickle.load(io.BytesIO(text), where, find_storage))


def check_records(path: Path, start: int, length: int, offsets: Collection[int] | None = None) -> None:
    """Compare records with the CRC-32 that the zip at these bytes of a file notes of each; reads them.

    Args:
        offsets: in the file; only records that hold one of them, None for all. Zips written without checksums (torch can)
            note zero everywhere, and pass.

    Raises:
        ValueError: naming file and record.
    """
    where = f"{path} (bytes {start} to {start + length})"
    with open(path, "rb") as file:
        window = Window(file, start, length)
        try:
            archive = zipfile.ZipFile(window)
            if not any(info.CRC for info in archive.infolist()):
                return
            for info in archive.infolist():
                first = start + _data_start(window, info, where)
                if offsets is None or any(first <= offset < first + info.file_size for offset in offsets):
                    with archive.open(info) as record:
                        while record.read(PIECE_BYTES):
                            pass
        except (zipfile.BadZipFile, UnicodeDecodeError, OSError, EOFError, struct.error, NotImplementedError) as error:
            raise ValueError(f"{where} is damaged: {error}") from None


def is_whole(path: Path, start: int, length: int) -> bool:
    """Whether every record of a zip has the checksum that its directory notes; reads all of it."""
    with open(path, "rb") as file:
        try:
            return zipfile.ZipFile(Window(file, start, length)).testzip() is None
        except (zipfile.BadZipFile, OSError, ValueError, EOFError):
            return False


def _bytes(window: Window, info: zipfile.ZipInfo, where: str) -> bytes:
    if info.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"{where}: {info.filename} claims {info.file_size} bytes, at most {MAX_PICKLE_BYTES} are read")
    window.seek(_data_start(window, info, where))
    data = window.read(info.file_size)
    if info.CRC and zlib.crc32(data) != info.CRC:  # torch can write without checksums: then it is 0
        raise ValueError(f"{where}: {info.filename} does not have the checksum that the zip notes")
    return data


def _data_start(window: Window, info: zipfile.ZipInfo, where: str) -> int:
    """Where a record's data begins in the window: after its local header, whose name and extra field vary in length."""
    if info.header_offset < 0:
        raise ValueError(f"{where}: record {info.filename} begins before the file")
    window.seek(info.header_offset)
    header = window.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{where}: record {info.filename} has no header where the directory says")
    fields = _LOCAL_HEADER.unpack(header)
    if window.read(fields[-2]) != info.orig_filename.encode():
        raise ValueError(f"{where}: record {info.filename} has another name in its own header")
    start = info.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1]
    if start + info.file_size > window.length:
        raise ValueError(f"{where}: record {info.filename} reaches beyond the end")
    return start


@dataclass(frozen=True)
class Later:
    """A tensor that is promised now and written later."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Writer:
    """Writes one torch.save zip at the end of an open file: the object, then its tensors in order of appearance."""

    def __init__(self, file: IO[bytes], value: Any) -> None:
        self.window = Window(file, file.seek(0, os.SEEK_END))
        self.start = self.window.start
        self.archive = zipfile.ZipFile(self.window, "w", zipfile.ZIP_STORED, allowZip64=True)
        text, self.promised = _pickle(value)
        self.num_written = 0
        self._small("data.pkl", text)
        self._small("byteorder", b"little")

    def write(self, pieces: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Write the next promised tensor, given as an iterable of byte buffers."""
        promise = self.promised[self.num_written]
        if (promise.dtype, promise.shape) != (dtype, tuple(shape)):
            raise ValueError(f"tensor {self.num_written} was promised as {promise}, got {dtype} {tuple(shape)}")
        with self.archive.open(self._record(f"data/{self.num_written}"), "w", force_zip64=True) as record:
            for piece in pieces:
                record.write(piece)
        self.num_written += 1

    def close(self) -> int:
        """Finish the zip; its length in bytes."""
        if self.num_written != len(self.promised):
            raise ValueError(f"{self.num_written} of {len(self.promised)} promised tensors were written")
        self._small("version", b"3\n")
        self.archive.close()
        return self.window.length

    def _small(self, name: str, data: bytes) -> None:
        with self.archive.open(self._record(name), "w", force_zip64=True) as record:
            record.write(data)

    def _record(self, name: str) -> zipfile.ZipInfo:
        """A record whose data will start at a multiple of 64: its extra field is padded to that."""
        info = zipfile.ZipInfo(f"archive/{name}")
        zip64_bytes = 20  # zipfile puts its own zip64 field before ours
        header = self.window.tell() + _LOCAL_HEADER.size + len(info.filename) + zip64_bytes
        padding = -(header + 4) % ALIGNMENT
        info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        return info


class _Pickler(pickle.Pickler):
    """Writes each `Later` as torch writes a tensor."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)
        self.promised: list[Later] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Record):
            return ("storage", value.storage_type, str(value.number), "cpu", value.count)
        return None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Later):
            return NotImplemented
        meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
        record = _Record(_storage_type(value.dtype), len(self.promised), meta.numel())
        self.promised.append(value)
        arguments = (record, 0, tuple(value.shape), meta.stride(), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


@dataclass(frozen=True)
class _Record:
    storage_type: type
    number: int
    count: int


def _storage_type(dtype: torch.dtype) -> type:
    names = {f"torch.{dtype_name}": storage for storage, dtype_name in STORAGES.items()}
    if str(dtype) not in names:
        raise ValueError(f"dtype={dtype}: allowed are {', '.join(names)}")
    return getattr(torch, names[str(dtype)])


def _pickle(value: Any) -> tuple[bytes, list[Later]]:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    return buffer.getvalue(), pickler.promised


def only_tensor(file: TorchFile, where: str) -> Extent:
    """The tensor of a file that holds nothing else."""
    if not isinstance(file.value, Extent):
        raise ValueError(f"{where} holds a {type(file.value).__name__}, not a tensor")
    return file.value
