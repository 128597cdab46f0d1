"""Runs a piece of work in a forked child and kills it at a chosen change of the disk: where a rename, a new file, a removal begins.

The child forks after everything is imported, so a kill takes milliseconds. Python's audit events say what is about to happen
to the disk; the changes under one folder are numbered, and the work is killed before the one asked for.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

POINTS = int(os.environ.get("KILL_POINTS", "10"))  # `make test-kills` tries more
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
WRITES = os.O_WRONLY | os.O_RDWR


def count_changes(work: Callable[[], object], folder: Path) -> int:
    """How many changes of the disk under a folder a piece of work makes; it has to end well."""
    counter = folder.parent / f"{folder.name}.count"
    status = _fork(work, folder, None, counter)
    assert os.waitstatus_to_exitcode(status) == 0, f"the work failed, see {folder.parent / 'output'}"
    return int(counter.read_text())


def kill_at(work: Callable[[], object], folder: Path, number: int) -> bool:
    """Kill a piece of work at its change `number`, from 1; False if it ended before."""
    return _fork(work, folder, number, None) == signal.SIGKILL


def run_once(work: Callable[[], object], folder: Path) -> int:
    """The exit code of the work in a child."""
    return os.waitstatus_to_exitcode(_fork(work, folder, None, None))


def some_of(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 1 to count, evenly spaced, the ends among them."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})


def _fork(work: Callable[[], object], folder: Path, number: int | None, counter: Path | None) -> int:
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        output = os.open(folder.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        seen = _watch(str(folder.resolve()), number)
        code = work() or 0
        if counter is not None:
            counter.write_text(str(len(seen)))
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)


def _watch(folder: str, number: int | None) -> list[str]:
    seen: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(path, (str, bytes, os.PathLike)) and isinstance(flags, int) and flags & WRITES
        else:
            path, changes = (arguments[0], True) if event in EVENTS else (None, False)
        if changes and not isinstance(path, int) and os.path.realpath(os.fsdecode(path)).startswith(folder):
            seen.append(event)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen
