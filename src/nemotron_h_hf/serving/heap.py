"""Memory of freed tensors, given back to the system: glibc keeps what does not lie at the end of its heaps.

Caches that grow from row to row leave holes of all sizes. One call takes about 2 ms (docs/results/serving).
"""

from __future__ import annotations

import ctypes
import platform

LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def give_back() -> None:
    """All that is free; where the C library is another one, it decides itself."""
    if LIBC is not None:
        LIBC.malloc_trim(0)
