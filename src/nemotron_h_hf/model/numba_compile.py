"""Loops compiled by Numba, for CPUs, and their threads; optional, as Numba is.

A loop computes one part of its output of several. One thread computes all of it in a plain call, or each of torch's
threads a part. Starting and joining threads takes microseconds, and where another program uses the cores, a thread that
waits for its core holds up all others for milliseconds (docs/results/cpu_threads): so `Kernel` goes by the time that its
calls take. Parts are computed alike by any number of threads: the result has the same bits.
"""

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .forks import is_forked

try:  # inside `try`, for readers that check the imports of pushed model code
    from numba import cfunc, config, get_num_threads, njit, set_num_threads
except ImportError as missing:
    raise ImportError("the compiled steps of a CPU need numba; pip install numba") from missing

REORDER = {"reassoc", "contract", "nsz"}  # sums in any order, to fill vector registers; NaN and inf stay
SMALL_BYTES = 2**17  # a call that reads less runs on one thread: at 10 GB/s 13 us, what starting the others takes
NEWEST = 0.2  # weight of the newest call in a mean of seconds
CALLS_PER_TRY = 32  # a try that takes n times as long waits for as many times n calls: 3 % of the time at most
MOST_PATIENCE = 512  # calls until the slower way is tried again; each try that loses doubles the wait


def compiled(function: Callable) -> Callable:
    """`numba.njit` for one thread. It compiles in the first call; the machine code is kept on disk (`_shared`)."""
    return _jit(function)


def compiled_for_threads(function: Callable) -> Callable:
    """As `compiled`, with each `prange` divided among threads."""
    return _jit(function, parallel=True)


def compiled_for_c(signature: str) -> Callable:
    """As `compiled`, at once, with an `address` that machine code can call."""

    def compile(function: Callable) -> Callable:
        return _kept(lambda function, cache: cfunc(signature, cache=cache)(function), function)

    return compile


def _jit(function: Callable, **options: bool) -> Callable:
    options |= {"fastmath": REORDER, "error_model": "numpy"}
    return _kept(lambda function, cache: njit(cache=cache, **options)(function), function)


def _kept(compile: Callable[[Callable, bool], Callable], function: Callable) -> Callable:
    """Compiled with a cache on disk if there is a place for one."""
    try:
        return compile(_shared(function), True)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return compile(function, False)


def _shared(function: Callable) -> Callable:
    """The function, said to come from `_sources`: Numba keeps machine code by the folder and the module of a function, and
    each copy of this code that comes with a checkpoint would be compiled anew."""
    folder, source = _sources(), Path(function.__code__.co_filename)
    if folder is not None and (folder / source.name).exists():
        name = f"nemotron_h_{folder.name}_{source.stem}"
        sys.modules.setdefault(name, ModuleType(name))  # what Numba looks up when it loads machine code
        function.__module__ = name
        function.__code__ = function.__code__.replace(co_filename=str(folder / source.name))
    return function


@cache
def _sources() -> Path | None:
    """A folder named by the text of the compiled files, with a copy of them; None where it cannot be written. A change of
    one file is a change of all: Numba looks at one alone."""
    here = sorted(Path(__file__).parent.glob("numba_*.py"))
    digest = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in here)).hexdigest()[:16]
    caches = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    folder = Path(caches).expanduser() / "nemotron_h_numba" / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in here:
            if not (folder / file.name).exists():
                part = folder / f"{file.name}.{os.getpid()}"
                part.write_bytes(file.read_bytes())
                part.replace(folder / file.name)
    except OSError:
        return None
    return folder


@dataclass
class Seconds:
    """What calls of one size took, on one thread and on all, and when the slower way is tried again."""

    recent: list[float] = field(default_factory=lambda: [math.inf, math.inf])
    wait: int = 0  # calls
    patience: int = 1

    def choose(self) -> int:
        """0 for one thread, 1 for all."""
        if math.inf in self.recent:
            return self.recent.index(math.inf)
        self.wait -= 1
        best = int(self.recent[1] < self.recent[0])
        return best if self.wait >= 0 else 1 - best

    def took(self, choice: int, seconds: float) -> None:
        """Take note of a call: a mean of the last few, a try counts by itself."""
        before, tried = self.recent[choice], self.wait < 0
        self.recent[choice] = seconds if tried or before == math.inf else before + NEWEST * (seconds - before)
        if tried or (before == math.inf and choice == 1):
            times = self.recent[choice] / self.recent[1 - choice]
            self.patience = 1 if times < 1 else min(2 * self.patience, MOST_PATIENCE)
            self.wait = max(self.patience, int(CALLS_PER_TRY * times) if times >= 1 else 0)


class Kernel:
    """A compiled loop that is called with the number of bytes it reads, then its arguments.

    Args:
        one: called with the arguments, the number of a part and the number of parts: computes that part.
        by_all: called with the arguments and the number of parts: computes all of them.
    """

    def __init__(self, one: Callable, by_all: Callable) -> None:
        self.one, self.by_all, self.compiled = one, by_all, [False, False]
        self.seconds: dict[tuple[int, int], Seconds] = {}

    def __call__(self, num_bytes: int, *args: object) -> None:
        threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
        if threads == 1 or num_bytes < SMALL_BYTES or is_forked():
            self.one(*args, 0, 1)
            return
        seconds = self.seconds.setdefault((threads, num_bytes.bit_length()), Seconds())
        choice = seconds.choose()
        start = time.perf_counter()
        if choice:
            self._call_all(threads, args)
        else:
            self.one(*args, 0, 1)
        if self.compiled[choice]:
            seconds.took(choice, time.perf_counter() - start)
        self.compiled[choice] = True

    def _call_all(self, threads: int, args: tuple[object, ...]) -> None:
        before = torch.get_num_threads()
        if get_num_threads() != threads:
            set_num_threads(threads)
        self.by_all(*args, threads)
        if torch.get_num_threads() != before:  # Numba sets it when it starts its threads, in torch's OpenMP library
            torch.set_num_threads(before)
