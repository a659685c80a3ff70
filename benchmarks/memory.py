"""The most memory that some work takes above what was in use before it."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

HIGH_WATER = Path("/proc/self/clear_refs")  # writing 5 sets the high-water mark back; see proc(5)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """Of a CUDA device what torch gave out, else this process's resident memory, to a few hundred
    KiB. None where the system does not tell (anything but Linux with glibc)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # What malloc has kept would be used again without being seen.
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is None or not os.access(HIGH_WATER, os.W_OK):
        return None
    gc.collect()
    give_back(0)
    HIGH_WATER.write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, of a line such as "VmRSS:     1234 kB"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
