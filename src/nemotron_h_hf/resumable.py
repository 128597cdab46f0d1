"""Writes a checkpoint folder that a killed run can continue, and that never looks whole before it is.

The journal has a line of JSON per finished file, written after the file has its final name. A file that it names is checked
against its checksums before it is kept; a file that it does not name is written again. What makes a folder look whole,
config.json, comes last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Digest, ShardWriter, pieces, write_index
from .model.weights import Checkpoint, TensorSpec, byte_view
from .output_folders import is_empty
from .whole_files import write_text


class Journal:
    """Finished files of one piece of work (`what`: "conversion", "slice") in one folder, which is locked (output_folders.py).

    Raises ValueError when the folder holds something else than this very work, unfinished.
    """

    def __init__(self, folder: Path, fingerprint: str, what: str = "conversion") -> None:
        self.path = folder / f"{what}_journal.jsonl"
        self.done: dict[str, Any] = {}
        lines = self._lines() if self.path.is_file() else []
        if not lines:  # or killed before the first line was whole
            self.path.unlink(missing_ok=True)
            if not is_empty(folder):
                raise ValueError(f"{folder} is not empty; choose a new folder (nothing in it was touched)")
            lines = [{"fingerprint": fingerprint}]
        if lines[0].get("fingerprint") != fingerprint:
            raise ValueError(f"{folder} holds another {what}, unfinished; remove it or choose a new folder")
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.done = {line["file"]: line["record"] for line in lines[1:]}

    def add(self, file: str, record: Any) -> None:
        """Note a file that is finished."""
        self._append({"file": file, "record": record})
        self.done[file] = record

    def finish(self) -> None:
        """The work is complete: nothing is left to resume."""
        self.path.unlink()

    def _append(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[dict]:
        """The whole lines; one that a crash cut off or left empty, and what follows it, does not count."""
        lines = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(content, dict) or not content.keys() >= (
                {"file", "record"} if lines else {"fingerprint"}
            ):
                break
            lines.append(content)
        return lines


def write_shards(
    folder: Path,
    shards: Mapping[str, Sequence[TensorSpec]],
    fill: Callable[[ShardWriter, Sequence[TensorSpec]], None],
    journal: Journal,
    progress: Callable[[int], object],
) -> tuple[dict[str, Digest], list[str]]:
    """Write all shards and their index; those that `journal` names are kept if they still are what was written.

    `fill` writes the tensors of one shard. Returns what was seen of each tensor, and the names of the files kept.
    """
    digests: dict[str, Digest] = {}
    kept = []
    for file, specs in shards.items():
        seen = _finished(folder / file, specs, journal.done.get(file))
        if seen is None:
            with ShardWriter(folder / file, specs) as writer:
                fill(writer, specs)
            seen = writer.digests
            journal.add(file, seen)
        else:
            kept.append(file)
            progress(sum(spec.num_bytes for spec in specs))
        digests |= seen
    write_index(folder, shards)
    return digests, kept


def check_room(target: Path, num_bytes: int) -> None:
    """Raise a ValueError unless the disk has room for `num_bytes` in `target`, less what is there already."""
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    there = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) if target.is_dir() else 0
    free = shutil.disk_usage(existing).free
    if num_bytes - there > free:
        raise ValueError(f"{target} needs {num_bytes / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free")


def _finished(path: Path, specs: Sequence[TensorSpec], record: dict | None) -> dict[str, Digest] | None:
    """What the journal noted of a file, if the file is there and still is what was noted."""
    if record is None or not path.is_file():
        return None
    noted = {name: Digest(*values) for name, values in record.items()}
    try:
        written = Checkpoint(path)
    except ValueError:  # cut short since then
        return None
    return noted if list(noted) == [spec.name for spec in specs] and matches(written, noted) else None


def matches(checkpoint: Checkpoint, noted: dict[str, Digest]) -> bool:
    """Whether the tensors of a written checkpoint still have the checksums that were noted."""
    return all(name in checkpoint and checksum(checkpoint[name]) == digest.sha256 for name, digest in noted.items())


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row after row."""
    digest = hashlib.sha256()
    for piece in pieces(tensor, tensor.dtype):
        digest.update(byte_view(piece))
    return digest.hexdigest()
