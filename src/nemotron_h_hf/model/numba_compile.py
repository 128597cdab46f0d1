"""Compiling with Numba, for CPUs; optional, as Numba is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

try:  # inside `try`, for readers that check the imports of pushed model code
    from numba import get_num_threads, njit, prange
except ImportError as missing:
    raise ImportError("the compiled steps of a CPU need numba; pip install numba") from missing

__all__ = ["compiled", "prange"]

REORDER = {"reassoc", "contract", "nsz"}  # sums in any order, to fill vector registers; NaN and inf stay


def compiled(signature: str) -> Callable[[Callable], Callable]:
    """`numba.njit`, at once, for all threads. The machine code is cached on disk, next to the function's file or
    in the user's cache folder, if one of them can be written to."""

    def compile(function: Callable) -> Callable:
        options = {"parallel": True, "fastmath": REORDER}
        with torch_threads_kept():
            try:
                return njit(signature, cache=True, **options)(function)
            except RuntimeError as error:
                if "cannot cache" not in str(error):
                    raise
                return njit(signature, **options)(function)

    return compile


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Numba starts its threads once, in the OpenMP library that torch has loaded, and sets their number."""
    before = torch.get_num_threads()
    try:
        yield
        get_num_threads()  # starts them, if compiling has not
    finally:
        torch.set_num_threads(before)
