"""Compiling with Numba, for CPUs; optional, as Numba is."""

from collections.abc import Callable

try:  # who reads the imports of the files beside weights must not ask for it
    from numba import njit, prange
except ImportError as missing:
    raise ImportError("the compiled steps of a CPU need numba; pip install numba") from missing

__all__ = ["compiled", "prange"]

REORDER = {"reassoc", "contract", "nsz"}  # sums in any order, so that they fill vector registers; NaN and inf stay


def compiled(signature: str) -> Callable[[Callable], Callable]:
    """`numba.njit`, at once, for all threads. The machine code is kept for the next process beside the function's file or
    in the user's cache folder; where neither can be written to it is not."""

    def compile(function: Callable) -> Callable:
        options = {"parallel": True, "fastmath": REORDER}
        try:
            return njit(signature, cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return njit(signature, **options)(function)

    return compile
