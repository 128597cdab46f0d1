"""Children forked from a process that has computed (DataLoader workers, multiprocessing, preloading servers) on a CPU.

A fork copies a process without its threads. In the child, OpenMP (PyTorch's and Numba's) waits for them forever, and
Numba's library ends the process. The child therefore computes on one thread, without Numba.
"""

import os
from functools import cache

import torch

_forked = False


@cache
def prepare_for_forks() -> None:
    """Make forked children of this process usable; call it before threads start."""
    if os.name == "posix":
        os.register_at_fork(after_in_child=_use_one_thread)


def is_forked() -> bool:
    """Whether this is a forked child of a process that had called `prepare_for_forks`."""
    return _forked


def _use_one_thread() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)
