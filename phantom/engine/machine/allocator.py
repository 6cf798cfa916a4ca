"""How the C library keeps memory for tensors on a CPU."""

from __future__ import annotations

import ctypes
import platform

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for the next tensor of its size; on other systems than glibc do nothing.

    By default glibc returns a large block to the system when it is freed. A training step allocates the same blocks as
    the step before, and the system maps and zeroes every page of them again: tens of thousands of page faults a step.
    With this the memory of the process stays at its peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_MMAP_THRESHOLD, 2**30)


def return_freed_memory() -> None:
    """Return to the system what earlier work of this process has freed; on other systems than glibc do nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
