"""Runs one mutated input and says what came of it.

clear      refused with a ValueError or OSError of one line's worth that names a file or a value; exit status 1 or 2
right      the same result as of the whole input, or the result that an independent reader gets
silent     another result, without a word: the worst (with a warning that names the tensor: clear)
bare       an error of another kind, or one that names nothing
hang       no answer in `SECONDS`
"""

from __future__ import annotations

import contextlib
import io
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import nemotron_h_cli
from nemotron_h_hf.model import loading

SECONDS = 60


class Verdict(NamedTuple):
    """What came of one mutation; `said` is the error, or the difference."""

    kind: str
    said: str


class Hang(BaseException):
    """Raised by the clock, past every `except Exception`."""


class Refused(Exception):
    """A command line ended with a status that is not 0; the message is the last line of standard error."""


def judge(run: Callable[[], Any], expected: Any, names: tuple[str, ...]) -> Verdict:
    """Run it; `names`: a clear error holds one of these (file, folder, field)."""
    warned: list[str] = []
    try:
        with _clock(), _quiet(), _warned(warned):
            found = run()
    except Hang:
        return Verdict("hang", f"no answer in {SECONDS} s")
    except Refused as error:
        return Verdict("bare" if "--debug shows where" in str(error) or not str(error) else "clear", str(error))
    except (ValueError, OSError) as error:
        is_clear = type(error) is not UnicodeDecodeError and any(name in str(error) for name in names)
        return Verdict("clear" if is_clear else "bare", f"{type(error).__name__}: {error}")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("bare", f"{type(error).__name__}: {error} at {where.filename}:{where.lineno}")
    if found == expected:
        return Verdict("right", "")
    if warned:
        return Verdict("clear", warned[0])
    return Verdict("silent", f"{found!r:.200}")


def command(words: list[str]) -> int:
    """`nemotron-h WORDS` in this process; 0, or `Refused`."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = nemotron_h_cli.main(words)
        except SystemExit as end:
            status = end.code
    if status == 0:
        return 0
    lines = [line for line in errors.getvalue().splitlines() if line.strip()]
    if status not in (1, 2) or not lines:
        raise Refused(f"status {status}, said {lines[-1:]}: --debug shows where")
    raise Refused(lines[-1])


@contextlib.contextmanager
def _warned(said: list[str]) -> Iterator[None]:
    """Collects what loading warns of: half precision of both kinds, which a damaged header can make of a whole one."""
    before = loading.logger.warning
    loading.logger.warning = lambda message, *_: said.append(message) if " in F16 and " in message else None
    try:
        yield
    finally:
        loading.logger.warning = before


@contextlib.contextmanager
def _clock() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
