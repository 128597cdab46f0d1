"""Peak memory of one job, measured in a separate process, which nothing else has used. Linux only.

The peak is the kernel's own (VmHWM of /proc/self/status), reset just before the job; what counts is how far it rises
above the resident memory of that moment, when the weights are there and nothing else.
"""

import contextlib
import gc
import multiprocessing
import re
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from ..environment import available_bytes, can_measure, reset_peak, status_bytes

GB = 10**9


@dataclass(frozen=True)
class Footprint:
    """Memory of one job beyond what was resident before it; `failure` instead of `extra_bytes` if it ran out of it."""

    extra_bytes: int | None
    seconds: float
    failure: str | None = None
    at_least_bytes: int | None = None  # of a failed job: what it had got, and what it asked for next


def measure_apart(job: Callable[..., Footprint], *arguments: object) -> Footprint:
    """Call `job(*arguments)` in a new process; both must be importable there."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process would inherit dead OpenMP threads
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(job, *arguments).result()
        except BrokenProcessPool:
            return Footprint(None, 0.0, "the process was ended, probably because the machine ran out of memory")


def footprint(job: Callable[[], object], limit_bytes: int | None = None) -> Footprint:
    """Run a job in this process and tell its memory and seconds."""
    gc.collect()
    reset_peak()
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    failure = None
    try:
        with memory_guard(limit_bytes):
            job()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        failure = str(error)
    seconds = time.perf_counter() - start
    extra = max(0, status_bytes("VmHWM") - before)
    if failure is None:
        return Footprint(extra, seconds)
    wanted = re.search(r"allocate (\d+) bytes", failure)
    at_least = extra + int(wanted.group(1)) if wanted else extra
    return Footprint(None, seconds, failure.splitlines()[0], at_least)


@contextlib.contextmanager
def memory_guard(limit_bytes: int | None = None) -> Iterator[None]:
    """Let allocations fail inside, with an error that can be caught, instead of the kernel ending the process.

    They fail when `limit_bytes` more than now are allocated; None stands for most of what the machine has left.
    """
    if not can_measure():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = int(0.9 * available_bytes()) if limit_bytes is None else limit_bytes
    limit = status_bytes("VmData") + allowed
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def out_of_memory(error: Exception) -> bool:
    """Whether an error of PyTorch says that an allocation failed."""
    signs = ("allocate memory", "bad_alloc", "could not create a primitive")  # the last is oneDNN's way of saying it
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
