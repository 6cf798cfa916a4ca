"""Whether a step leaves anything behind: many steps with Python's garbage collector off."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from phantom.engine.measure.timing import StepTimer
from scripts.bench.measure import Row

SETTLE = 20  # steps after which optimiser state, caches and the allocator's heap exist


def measure_growth(rows: Sequence[Row], steps: int, device: torch.device) -> None:
    """Take `steps` more steps of every variant of ours; add what is alive after them to its facts.

    The facts are `growth`: the steps, and the change in live tensors, in their bytes, and in the memory of the process
    (on a GPU, its allocated memory). A reference cycle around a graph would show as a tensor a step.
    """
    for row in rows:
        if row.role != "ours":
            continue
        timer = StepTimer(device)
        gc.collect()
        gc.disable()
        try:
            for _ in range(SETTLE):
                row.variant.step(timer)
                timer.take()
            before = _alive(device)
            for _ in range(steps):
                row.variant.step(timer)
                timer.take()
            change = [b - a for a, b in zip(before, _alive(device), strict=True)]
        finally:
            gc.enable()
        row.facts["growth"] = {"steps": steps, **dict(zip(("tensors", "bytes", "memory"), change, strict=True))}


def _alive(device: torch.device) -> tuple[int, int, int]:
    """Return live tensors, the bytes of their storages, and the memory of the process or the GPU."""
    # no subclasses: the compiler keeps some that have no storage
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_sparse}
    if device.type == "cuda":
        torch.cuda.synchronize()
        memory = torch.cuda.memory_allocated(device)
    else:
        memory = int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGESIZE")
    return len(tensors), sum(storages.values()), memory
