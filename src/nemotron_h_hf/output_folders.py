"""Folders that commands write: apart from their sources, one run at a time, begun again after a kill, not made twice.

with writing(output, adapter, base) as target:
    if is_made(target, made_from):
        return                             # this very command has been here, and its files are as it left them
    with saving(target) as staging:
        ...
        note_made(staging, made_from)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .model.saving import clear_leftovers, clear_parts, is_own, locked, staged
from .whole_files import write_json

RECORD_NAME = ".nemotron-h.json"
PIECE_BYTES = 16 * 2**20
WEIGHTS = (".safetensors", ".distcp", ".pt")


@contextmanager
def writing(target: str | os.PathLike, *sources: str | os.PathLike | None) -> Iterator[Path]:
    """The target's real path, while no other run writes there.

    Args:
        sources: folders that the command reads; hub ids and None are passed over.

    Raises:
        ValueError: if the target is a source, holds one or is inside one, or is a file.
        BlockingIOError: if another run is writing there.
    """
    folder = resolve_target(target, *sources)
    with locked(folder):
        clear_leftovers(folder)
        clear_parts(folder)
        yield folder


def resolve_target(target: str | os.PathLike, *sources: str | os.PathLike | None) -> Path:
    """The real path of a folder to write: links followed, `..` resolved as it will be once all folders on the way exist.

    Raises:
        ValueError: if it is a source, holds one or is inside one, or is a file.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_dir():
        raise ValueError(f"{target} is a file: allowed is a folder")
    for source in sources:
        if source is None or not os.path.exists(source):
            continue
        place = Path(os.path.realpath(source))
        how = "is" if _same(path, place) else None
        how = how or ("is inside" if any(_same(parent, place) for parent in path.parents) else None)
        how = how or ("holds" if any(_same(parent, path) for parent in place.parents) else None)
        if how:
            raise ValueError(
                f"the target {target} {how} the source {source}; choose another folder (nothing was touched)"
            )
    return path


def is_empty(target: Path) -> bool:
    """Whether a folder has nothing in it that a run would mind."""
    return all(is_own(path.name) for path in target.iterdir())


def is_made(target: Path, made_from: Any) -> bool:
    """Whether `note_made` noted the same in this folder, and its files are as they were then.

    Raises:
        ValueError: if the folder has other files, or some of these were changed or are missing.
    """
    if is_empty(target):
        return False
    try:
        noted = json.loads((target / RECORD_NAME).read_text(encoding="utf-8"))
        same, files = noted["made_from"] == fingerprint(made_from), dict(noted["files"])
    except (OSError, ValueError, LookupError, TypeError):
        same, files = False, {}
    if not same:
        raise ValueError(f"{target} is there already: allowed is a new or empty folder (nothing in it was touched)")
    for name, sha256 in files.items():
        if not (target / name).is_file() or file_checksum(target / name) != sha256:
            raise ValueError(
                f"{target / name} is missing or was changed since it was made; remove {target} to make it again"
            )
    return True


def note_made(folder: Path, made_from: Any) -> None:
    """Note in a folder that is finished what it was made from, and the checksums of its files."""
    files = {path.as_posix(): file_checksum(folder / path) for path in staged(folder)}
    write_json(folder / RECORD_NAME, {"made_from": fingerprint(made_from), "files": files})


def fingerprint(made_from: Any) -> str:
    """A digest of arguments and stamps."""
    return hashlib.sha256(json.dumps(made_from, default=str, sort_keys=True).encode()).hexdigest()


def stamps(source: str | os.PathLike, apart_from: Path | None = None) -> Any:
    """Names, sizes and times of the files of a folder (or next to a file), which differ when the files do. Hub ids as they are."""
    if not os.path.exists(source):
        return str(source)
    base = Path(source) if Path(source).is_dir() else Path(source).parent
    files = [path for path in sorted(base.rglob("*")) if path.is_file() and not is_own(path.name)]
    places = [(path.resolve(), path.stat()) for path in files]
    return [
        (str(place), stat.st_size, stat.st_mtime_ns)
        for place, stat in places
        if apart_from is None or not place.is_relative_to(apart_from)
    ]


def refuse_changed(noted: Any) -> None:
    """Raise a ValueError if a file of weights is not as `stamps` noted it: what was read from it may be of two models."""
    for path, size, time in noted if isinstance(noted, list) else ():
        if path.endswith(WEIGHTS):
            try:
                found = os.stat(path)
            except OSError:
                found = None
            if found is None or (found.st_size, found.st_mtime_ns) != (size, time):
                raise ValueError(
                    f"{path} was changed while it was read: what was made of it may be of two models and does not count; "
                    "give the command again, with a new folder"
                )


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one folder, also by bind mounts and letters that a file system does not tell apart."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:  # not there yet
        return False
