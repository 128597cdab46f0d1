"""Loops compiled by Numba, for CPUs, and their threads; optional, as Numba is.

A loop computes one part of its output of several. One thread computes all of it in a plain call, or each of torch's
threads a part. Starting and joining threads takes microseconds, and where another program uses the cores, a thread that
waits for its core holds up all others for milliseconds (docs/results/cpu_threads): so `Kernel` goes by the time that its
calls take. Parts are computed alike by any number of threads: the result has the same bits.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from .forks import is_forked

try:  # inside `try`, for readers that check the imports of pushed model code
    from numba import carray, config, get_num_threads, njit, prange, set_num_threads, types
    from numba.core.cgutils import voidptr_t
    from numba.extending import intrinsic, overload
except ImportError as missing:
    raise ImportError("the compiled steps of a CPU need numba; pip install numba") from missing

__all__ = ["Kernel", "carray", "compiled", "compiled_for_threads", "exponential", "floats", "pointer", "prange", "rounded", "widened"]

REORDER = {"reassoc", "contract", "nsz"}  # sums in any order, to fill vector registers; NaN and inf stay
SMALL_BYTES = 2**17  # a call that reads less runs on one thread: at 10 GB/s 13 us, what starting the others takes
NEWEST = 0.2  # weight of the newest call in a mean of seconds
MOST_PATIENCE = 512  # calls until the slower way is tried again; each try that loses doubles the wait


def compiled(function: Callable) -> Callable:
    """`numba.njit` for one thread. It compiles in the first call; the machine code is cached on disk, next to the
    function's file or in the user's cache folder, if one of them can be written to."""
    return _jit(function)


def compiled_for_threads(function: Callable) -> Callable:
    """As `compiled`, with each `prange` divided among threads."""
    return _jit(function, parallel=True)


def _jit(function: Callable, **options: bool) -> Callable:
    try:
        return njit(cache=True, fastmath=REORDER, error_model="numpy", **options)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return njit(fastmath=REORDER, error_model="numpy", **options)(function)


@intrinsic
def pointer(_context, address):
    """The memory at an address (an int64), for `numba.carray`."""

    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], voidptr_t)

    return types.voidptr(types.int64), generate


def widened(value):
    """A weight or an input as fp32: int8 as it is, uint16 as the bits of a bfloat16. For compiled code."""


@overload(widened, inline="always")
def _widened(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: np.float32(value)


def rounded(value, like):
    """fp32 as it is, or as the bits of the nearest bfloat16 where `like` is an array of those. For compiled code."""


@overload(rounded, inline="always")
def _rounded(value, like):
    if like.dtype == types.uint16:
        return lambda value, like: _bfloat16_bits(value)
    return lambda value, like: value


@compiled
def exponential(x):  # pragma: no cover, machine code
    """exp(x) in fp32 to 3e-7 of it, from -87 to 88 (further out the value there), in operations that fill vector
    registers: the library's function takes one value at a time."""
    given, x = x, min(max(x, np.float32(-87)), np.float32(88))
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)  # ln 2 in two parts
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    p = p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p if given == given else given


@compiled
def _bfloat16_bits(value):  # pragma: no cover, machine code
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))  # stays NaN
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@compiled
def floats(address, is_bf16, size):  # pragma: no cover, machine code
    """The fp32 values at an address, or a copy of the bfloat16 ones."""
    if not is_bf16:
        return carray(pointer(address), size, np.float32)
    held, out = carray(pointer(address), size, np.uint16), np.empty(size, np.float32)
    for i in range(size):
        out[i] = widened(held[i])
    return out


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
        if tried:
            won = self.recent[choice] < self.recent[1 - choice]
            self.wait = self.patience = 1 if won else min(2 * self.patience, MOST_PATIENCE)


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
