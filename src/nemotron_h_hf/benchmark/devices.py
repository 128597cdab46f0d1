"""The device that a benchmark runs on: its clock, its memory, and the two rates that no program on it can beat.

Both rates are measured in the run that they are used in: bytes per second through memory, by a copy and by a product of a
matrix with a vector (the larger counts), and operations per second of one large matrix product.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..environment import can_measure, reset_peak, status_bytes
from .memory import memory_guard, out_of_memory

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12}  # dense bf16, NVIDIA's data sheets of the SXM modules; what MFU is of
MATRIX_SIZE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 2**32, "cpu": 2**27}


@dataclass(frozen=True)
class Rates:
    """Of one device, for one dtype: bytes and operations (a multiplication with an addition is two) per second."""

    bytes_per_second: float
    flops_per_second: float

    def floor_seconds(self, num_bytes: float, flops: float) -> float:
        """No implementation that moves these bytes and does these operations takes less."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def find_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: for CUDA on a machine without it, and for kinds that cannot be measured.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: allowed are cuda and cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {name}: allowed are cuda and cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch sees no GPU on this machine; --device cpu runs the same code here")
    return device


def measure_rates(device: torch.device, dtype: torch.dtype, num_runs: int = 10) -> Rates:
    """Medians of `num_runs`, after one run to warm up."""
    bandwidth = max(_copy_rate(device, num_runs), _product_rate(device, dtype, num_runs))
    size = MATRIX_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return Rates(bandwidth, 2 * size**3 / median_seconds(device, lambda: a @ b, num_runs))


def _copy_rate(device: torch.device, num_runs: int) -> float:
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(device, lambda: target.copy_(source), num_runs)


def _product_rate(device: torch.device, dtype: torch.dtype, num_runs: int) -> float:
    matrix = torch.randn(COPY_BYTES[device.type] // 2**14, 2**14 // dtype.itemsize, device=device, dtype=dtype)
    vector = torch.randn(matrix.shape[1], 1, device=device, dtype=dtype)
    return matrix.nbytes / median_seconds(device, lambda: matrix @ vector, num_runs)


def median_seconds(device: torch.device, job: Callable[[], object], num_runs: int) -> float:
    """Of one call; on a GPU several calls are queued before the clock is read, as in a model."""
    calls = 10 if device.type == "cuda" else 1
    job()
    times = []
    for _ in range(num_runs):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            job()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def peak_flops(device: torch.device) -> float | None:
    """Of the data sheet, for dense bf16; None for a device that is not in the list."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def describe_device(device: torch.device) -> dict[str, str | int]:
    """What the device is, without the machine's name."""
    if device.type == "cpu":
        return {"kind": "cpu", "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    capability = f"{found.major}.{found.minor}"
    return {"kind": "cuda", "name": found.name, "memory_bytes": found.total_memory, "capability": capability}


def synchronize(device: torch.device) -> None:
    """Wait until everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_memory_back(device: torch.device) -> None:
    """Free what nothing refers to any more, the allocator's reserve included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_within(
    job: Callable[[], object], device: torch.device, budget_bytes: int | None
) -> tuple[object, int | None, str | None]:
    """Run a job that may run out of memory.

    Args:
        budget_bytes: what the job may take beyond what is held now; enforced on a CPU. None: all there is.

    Returns:
        its result; peak bytes (on a GPU of everything allocated, on a CPU of what came on top; None where it cannot be
        told); and why it failed, or None.
    """
    give_memory_back(device)
    before = _reset_peak(device)
    result = failure = None
    try:
        if device.type == "cuda":
            result = job()
            synchronize(device)
        else:
            with memory_guard(budget_bytes):
                result = job()
    except (MemoryError, RuntimeError) as error:  # torch.cuda.OutOfMemoryError is a RuntimeError
        if not (isinstance(error, torch.OutOfMemoryError) or out_of_memory(error)):
            raise
        failure = f"out of memory: {str(error).splitlines()[0]}"
    peak = _peak(device, before)
    if failure:
        give_memory_back(device)
    return result, peak, failure


def _reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    if not can_measure():
        return 0
    reset_peak()
    return status_bytes("VmRSS")


def _peak(device: torch.device, before: int) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, status_bytes("VmHWM") - before) if can_measure() else None
