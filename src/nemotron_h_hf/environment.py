"""The machine, the versions of what computes, and the memory of this process as the kernel counts it."""

import os
import platform
import re
import resource
import sys
from pathlib import Path

import torch
import transformers

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what to write to clear_refs, man 5 proc


def machine() -> dict[str, str | int | float]:
    """What runs this process, without its name."""
    return {
        "cpu": _found(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo")) or platform.processor(),
        "cores": os.cpu_count() or 0,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def can_measure() -> bool:
    """Whether this system tells and resets a process's peak. Linux only."""
    return STATUS.exists() and CLEAR_REFS.exists()


def status_bytes(name: str) -> int:
    """A size that the kernel keeps about this process: VmRSS, VmHWM (peak of it), VmData, ..."""
    return int(_found(rf"^{name}:\s+(\d+) kB", STATUS)) * 1024


def reset_peak() -> None:
    """Let VmHWM begin again at what is resident now."""
    CLEAR_REFS.write_text(RESET_PEAK)


def available_bytes() -> int:
    """Memory that this machine could still give."""
    return int(_found(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo"))) * 1024


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: PyTorch's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _found(pattern: str, path: Path) -> str | None:
    found = re.search(pattern, path.read_text(), re.MULTILINE) if path.exists() else None
    return found and found[1]
