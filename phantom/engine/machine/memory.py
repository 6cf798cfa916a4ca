"""Peak memory of one job, also of a sweep whose jobs share a process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from phantom.engine.machine.allocator import return_freed_memory

CLEAR = Path("/proc/self/clear_refs")


def begin_peak(device: torch.device) -> None:
    """Forget the peaks of earlier jobs of this process.

    On macOS nothing can do so for resident memory: there the peak of a later job is at least that of the earlier ones.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        return_freed_memory()
        with contextlib.suppress(OSError):  # a kernel without it, or a sandbox
            CLEAR.write_text("5")  # sets the peak to what is resident now, see proc(5)


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes since `begin_peak`: allocated on the GPU, or resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kibibytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
