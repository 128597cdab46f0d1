"""Saving all or nothing: files are written in a staging folder inside the target, then moved in by renames.

What a reader sees at any moment, and finds after a kill, is the old checkpoint, the new one, or an error, never a mixture.
Where one file of weights is all that changes, a rename is all it takes. Otherwise:

    1. config.json goes: a folder without it is not loaded by anybody;
    2. new shards come in, under names that the target does not have (`model-1-00001-of-00003.safetensors` if need be), as a
       reader may have the old index; then the index, or the only file;
    3. the old shards go;
    4. the new config.json comes in.

Staging folders of processes that died are removed by the next save.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from .weights import INDEX_NAME, SINGLE_NAME

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

LOCK_NAME = ".nemotron-h.lock"
STAGING_PREFIX = ".saving-"
OLD_CONFIG_NAME = ".old-config.json"  # in a staging folder, while the target has none
MOVED_NAME = ".moved.json"  # in a staging folder: what a first save puts into an empty target
WORK_NAME = ".work"  # in a target: what a long command has measured so far
PART_SUFFIX = ".part"
OWN_PART = re.compile(r"\.\d+-[0-9a-f]{8}\.part")
CONFIG_NAME = "config.json"
OWN_WEIGHTS = re.compile(r"model((-\d+)?-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
WAIT_SECONDS = 60.0  # for another save to move its files in
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)

DESCRIPTIONS: set[str] = set()
"""Names of files that describe the weights, and go when those are replaced; whoever writes one adds its name."""

_held: dict[tuple[str, int], list[int]] = {}  # (path of the lock, thread) -> descriptor, times it is held


def save_whole(directory: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let `write` fill a folder, whose files then become those of `directory`, all or none of them.

    Weights of an earlier save that are not part of this one are removed, and so is what describes them (`DESCRIPTIONS`).

    Raises:
        OSError: if `directory` is a file or cannot be written, or the disk is full; it is then as it was.
    """
    with saving(directory) as staging:
        write(str(staging))


@contextmanager
def saving(directory: str | os.PathLike) -> Iterator[Path]:
    """As `save_whole`, for a block: the folder to write to; its files move in when the block ends well."""
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{directory} is a file, a folder is needed")
    is_new = not target.exists()
    with ExitStack() as stack:
        if is_new:
            stack.callback(_remove_if_empty, target)
        with locked(target, WAIT_SECONDS, remove=False):
            clear_leftovers(target)
            staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=target))
            stack.enter_context(locked(staging))  # tells that this process lives
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        with _named(target):
            yield staging
        if files := staged(staging):
            for path in files:
                flush(staging / path)
            with locked(target, WAIT_SECONDS):
                _move_in(staging, target, files)


@contextmanager
def whole_file(path: str | os.PathLike, only_writer: bool = False) -> Iterator[Path]:
    """The path to write to instead; `path` gets the file when the block ends well, and is left alone when it does not.

    Args:
        only_writer: the folder is locked, so the part may be named NAME.part for all to see; a dead run's is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{PART_SUFFIX}")  # short: `path` may have 255 bytes
    if only_writer:
        part = path.with_name(path.name + PART_SUFFIX)
        part.unlink(missing_ok=True)
    try:
        with _named(path):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk says which file it was: Python's own error does not, and safetensors has one of another kind."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


@contextmanager
def locked(folder: str | os.PathLike, wait_seconds: float = 0.0, remove: bool = True) -> Iterator[Path]:
    """Be the only process, and thread, that writes in a folder, which is made; whoever dies lets go. Who has it may take it again.

    Args:
        remove: take a folder away that was made here and is empty at the end.

    Raises:
        BlockingIOError: if another run is writing there, and still is after `wait_seconds`.
    """
    folder = Path(os.path.realpath(folder))
    key = (str(folder / LOCK_NAME), threading.get_ident())
    is_new = remove and not folder.exists()
    if key in _held:
        _held[key][1] += 1
    else:
        _held[key] = [_wait_for(folder, wait_seconds), 1]
    try:
        yield folder
    finally:
        _let_go(key)
        if is_new:
            _remove_if_empty(folder)


def clear_leftovers(target: Path) -> None:
    """Remove what dead processes left of their saves; the lock of `target` is held.

    What a first save had moved in before it was killed is half a checkpoint, and goes too.
    """
    for staging in target.glob(f"{STAGING_PREFIX}*"):
        alive = None
        with suppress(FileNotFoundError, NotADirectoryError):
            alive = _acquire(staging / LOCK_NAME)
        if alive is None:
            continue
        with suppress(OSError, ValueError):
            names = json.loads((staging / MOVED_NAME).read_text(encoding="utf-8"))
            if staged(staging):  # else all were moved: the save was done
                for name in names:
                    (target / name).unlink(missing_ok=True)
                for folder in sorted({(target / name).parent for name in names} - {target}, reverse=True):
                    folder.rmdir()
        shutil.rmtree(staging, ignore_errors=True)
        os.close(alive)


def clear_parts(target: Path) -> None:
    """Remove the unfinished files of dead processes, in a folder where no other process writes: its lock is held."""
    for path in target.rglob(f".*{PART_SUFFIX}"):
        if OWN_PART.fullmatch(path.name):
            path.unlink(missing_ok=True)


def is_own(name: str) -> bool:
    """Whether a name in a target is one that a run uses for a while, and not part of what it makes."""
    return name in (LOCK_NAME, WORK_NAME) or name.startswith(STAGING_PREFIX) or bool(OWN_PART.fullmatch(name))


def staged(staging: Path) -> list[Path]:
    """The files of a staging folder, relative to it."""
    own = {LOCK_NAME, MOVED_NAME, OLD_CONFIG_NAME}
    return sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file() and path.name not in own)


def flush(path: Path) -> None:
    """Put a file or the names of a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_in(staging: Path, target: Path, files: list[Path]) -> None:
    """The commit: see the head of this file."""
    if not any(not is_own(path.name) for path in target.iterdir()):
        (staging / MOVED_NAME).write_text(json.dumps([path.as_posix() for path in files]), encoding="utf-8")
        flush(staging / MOVED_NAME)
    files = _with_free_names(staging, target, files)
    stale = _stale(target, files)
    changed = [path for path in files if path.name == SINGLE_NAME or _differs(staging / path, target / path)]
    config = Path(CONFIG_NAME)
    guarded = config in files and (target / config).is_file() and len(changed) + len(stale) > 1
    if guarded:
        os.replace(target / config, staging / OLD_CONFIG_NAME)
    try:
        for path in sorted(changed, key=_order):
            if path != config:
                _replace(staging, target, path)
    except OSError:
        if guarded and not any(
            path.name in (SINGLE_NAME, INDEX_NAME) and not (staging / path).exists() for path in files
        ):
            os.replace(staging / OLD_CONFIG_NAME, target / config)  # nothing that counts has changed
        raise
    for path in stale:
        path.unlink(missing_ok=True)
    if config in changed or guarded:
        _replace(staging, target, config)
    flush(target)


def _with_free_names(staging: Path, target: Path, files: list[Path]) -> list[Path]:
    """Rename staged shards, and the index, if the target has one of their names."""
    if Path(INDEX_NAME) not in files:
        return files
    index = json.loads((staging / INDEX_NAME).read_text(encoding="utf-8"))
    names = set(index["weight_map"].values())
    for generation in count():
        new = {name: re.sub("^model-", f"model-{generation}-" if generation else "model-", name) for name in names}
        if not any((target / name).exists() for name in new.values()):
            break
    if generation:
        for name in names:
            os.rename(staging / name, staging / new[name])
        index["weight_map"] = {tensor: new[name] for tensor, name in index["weight_map"].items()}
        (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        flush(staging / INDEX_NAME)
    return staged(staging)


def _stale(target: Path, files: list[Path]) -> list[Path]:
    """Weights of an earlier save that this one does not replace, what makes them count first, and what speaks of them."""
    if not {SINGLE_NAME, INDEX_NAME} & {path.name for path in files}:
        return []
    names = sorted(
        (path.name for path in target.iterdir() if OWN_WEIGHTS.fullmatch(path.name)), key=_order, reverse=True
    )
    return [
        target / name
        for name in [*names, *sorted(DESCRIPTIONS)]
        if Path(name) not in files and (target / name).exists()
    ]


def _order(path: str | Path) -> int:
    """Shards, other files, what makes the weights count."""
    name = Path(path).name
    return 2 if name in (SINGLE_NAME, INDEX_NAME) else 0 if name.endswith(".safetensors") else 1


def _differs(new: Path, old: Path) -> bool:
    """Whether a file becomes another; shards always do, their names are new."""
    return not old.is_file() or new.read_bytes() != old.read_bytes()


def _replace(staging: Path, target: Path, path: Path) -> None:
    (target / path).parent.mkdir(parents=True, exist_ok=True)
    os.replace(staging / path, target / path)


def _wait_for(folder: Path, seconds: float) -> int | None:
    """The descriptor of a folder's lock."""
    end = time.monotonic() + seconds
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder went, with the one who made it
            descriptor = _acquire(folder / LOCK_NAME)
            if descriptor is not None:
                return descriptor
            if time.monotonic() >= end:
                raise BlockingIOError(f"{folder}: another run is writing here ({_holder(folder / LOCK_NAME)})")
        time.sleep(0.02)


def _acquire(path: Path) -> int | None:
    """The descriptor of a locked file, which is made; None if another has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # not removed by the one who had it
                    with suppress(OSError):  # a full disk
                        os.truncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                warnings.warn(
                    f"{path.parent}: its file system has no locks, see to it that one run writes", stacklevel=2
                )
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "unknown process"
    return "unknown process"


def _let_go(key: tuple[str, int]) -> None:
    if key not in _held:  # in a forked child
        return
    _held[key][1] -= 1
    if not _held[key][1]:
        descriptor, _ = _held.pop(key)
        with suppress(OSError):
            os.unlink(key[0])
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it has files
        folder.rmdir()


def _forget() -> None:
    """A forked child has no part in its parent's locks: they are free when the parent dies."""
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
