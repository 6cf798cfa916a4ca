"""Memory freed on a CPU is there for the next tensor, without a page fault."""

import platform
import resource

import pytest
import torch

from phantom.engine.machine.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_tensor_takes_the_place_of_the_last_one():
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 * 2**20 // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    pages = 64 * 2**20 // resource.getpagesize()
    # an aligned block needs a little more than the one before left: the first few grow the heap
    assert min(faults() for _ in range(12)) < pages / 100
