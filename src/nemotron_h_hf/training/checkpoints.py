"""Which checkpoint folders are whole: a marker, written last and flushed to the disk, lists their files, sizes and checksums.

transformers writes a dozen files into `checkpoint-N/` one after the other. The file UNFINISHED is written first, the marker
last, and then UNFINISHED is removed. A folder with UNFINISHED and no marker was left by a crash or a full disk: it is never
resumed from, and is removed. A folder with the marker that lost a file later is damaged: this is an error, and the run does
not fall back to an earlier checkpoint. A folder with neither is not ours and is left alone.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from transformers import TrainingArguments

from ..inputs import read_json
from ..model.saving import flush
from ..output_folders import writing
from ..whole_files import write_json

MARKER = "whole.json"
UNFINISHED = "UNFINISHED"
PIECE_BYTES = 4 * 2**20
SPARE_BYTES = 64 * 2**20  # for the small files next to weights and optimizer


def writing_run(args: TrainingArguments, *sources: str | os.PathLike | None) -> AbstractContextManager:
    """Keep other runs out of `args.output_dir`, which may not be a source, hold one or be inside one (output_folders.py).

    One process of a launch does this for all; if it is refused, the launcher ends the others.
    """
    return writing(args.output_dir, *sources) if args.process_index == 0 else nullcontext()


def last_whole_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The whole checkpoint of the most steps in a run's folder, or None.

    Raises:
        ValueError: if it was whole once and now lacks files.
    """
    folders = whole_checkpoints(output_dir)
    if not folders:
        return None
    check_whole(folders[-1])
    return folders[-1]


def whole_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Folders with the marker, by rising step."""
    return [folder for folder in _checkpoints(output_dir) if (folder / MARKER).is_file()]


def check_whole(folder: str | os.PathLike, contents: bool = True) -> dict[str, Any]:
    """What the marker says (`step` and what the trainer added), if all the files are there as they were written.

    Args:
        contents: read the files and compare their checksums too. Markers of version 0.1 have sizes alone.

    Raises:
        ValueError: naming the file that is missing, cut short or changed, or for a folder without the marker.
    """
    folder = Path(folder)
    if not (folder / MARKER).is_file():
        raise ValueError(f"{folder} is no whole checkpoint, {MARKER} is missing: writing it was interrupted")
    marker = _read_marker(folder / MARKER)
    for name, size in marker["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{folder / name} {what}, it was written with {size}; {_go_on(folder)}")
    if contents and "sha256" in marker:
        for name, found in _checksums(folder, marker["files"]).items():
            if found != marker["sha256"].get(name):
                raise ValueError(f"{folder / name} is damaged, its checksum is not that of {MARKER}; {_go_on(folder)}")
    return marker


def _read_marker(path: Path) -> dict[str, Any]:
    marker = read_json(path)
    noted = marker.pop("marker_sha256", None)
    if noted not in (None, _marker_checksum(marker)) or not isinstance(marker.get("files"), dict):
        raise ValueError(f"{path} is damaged; {_go_on(path.parent)}")
    return marker


def _marker_checksum(marker: Mapping[str, Any]) -> str:
    return sha256(json.dumps(marker, sort_keys=True, default=str).encode()).hexdigest()


def _go_on(folder: Path) -> str:
    return f"remove {folder} to resume from the checkpoint before it"


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, several at a time: hashing runs outside of Python's lock."""
    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names)))


def _checksum(path: Path) -> str:
    digest = sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def begin(folder: str | os.PathLike) -> None:
    """Make the folder of a checkpoint that is to be written; the file UNFINISHED is there from the start.

    Raises:
        FileExistsError: if there is one already that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is there already")
    made = _aside(folder)
    made.mkdir(parents=True)
    (made / UNFINISHED).touch()
    os.rename(made, folder)


def mark_whole(folder: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    """Flush every file of the folder to the disk, then write the marker with `facts`, sizes and checksums.

    Raises:
        OSError: if files of sharded weights or states are elsewhere.
    """
    folder = Path(folder)
    _require_shards(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, UNFINISHED))
    for path in files:
        flush(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    marker = {**facts, "files": sizes, "sha256": _checksums(folder, sizes)}
    write_json(folder / MARKER, {**marker, "marker_sha256": _marker_checksum(marker)})
    (folder / UNFINISHED).unlink()
    flush(folder)
    flush(folder.parent)


def discard_unfinished(output_dir: str | os.PathLike) -> list[Path]:
    """Remove what interrupted writes and removals left: unfinished checkpoints, and folders that were put aside."""
    for path in Path(output_dir).glob(".checkpoint-*"):
        if path.is_dir():
            shutil.rmtree(path)
    removed = []
    for folder in _checkpoints(output_dir):
        if (folder / MARKER).is_file():
            (folder / UNFINISHED).unlink(missing_ok=True)  # killed between the two
        elif (folder / UNFINISHED).is_file():
            _remove(folder)
            removed.append(folder)
    return removed


def discard_oldest(output_dir: str | os.PathLike, keep: int | None, never: str | None = None) -> None:
    """Remove the oldest whole checkpoints beyond the last `keep` (None: all stay), but not the folder `never`."""
    folders = whole_checkpoints(output_dir)
    for folder in folders[: -keep if keep else 0]:
        if never is None or folder.resolve() != Path(never).resolve():
            _remove(folder)


def require_space(output_dir: str | os.PathLike, needed_bytes: int) -> None:
    """Refuse to begin a checkpoint that the disk cannot take.

    Raises:
        OSError: with the bytes needed and free.
    """
    free = shutil.disk_usage(output_dir).free
    if free < needed_bytes + SPARE_BYTES:
        raise OSError(
            f"output_dir {output_dir} has {free / 2**20:,.0f} MiB free, the next checkpoint needs "
            f"{(needed_bytes + SPARE_BYTES) / 2**20:,.0f} MiB"
        )


def _aside(folder: Path) -> Path:
    """Where a checkpoint is made and removed: there it never counts, wherever that is interrupted."""
    aside = folder.with_name(f".{folder.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return aside


def _remove(folder: Path) -> None:
    aside = _aside(folder)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def _require_shards(folder: Path) -> None:
    """All that the index of sharded tensors names is here: otherwise other machines write to their own disks."""
    for index in folder.rglob(".metadata"):
        places = FileSystemReader(index.parent).read_metadata().storage_data.values()
        names = {place.relative_path for place in places}
        missing = sorted(name for name in names if not (index.parent / name).is_file())
        if missing:
            raise OSError(
                f"output_dir={str(folder.parent)!r}: allowed is a folder on a file system that all processes see: "
                f"{len(missing)} of the {len(names)} files of {index.parent} are not here, {missing[0]} first"
            )


def _checkpoints(output_dir: str | os.PathLike) -> Iterator[Path]:
    numbered = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    return (path for _, path in sorted(numbered))
