"""Full float32 arithmetic for a solver, whatever the user allows f: exact products, and no autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

REDUCED = ("tf32", "bf16")
# devices with autocast, asked for once: the compiler of torch 2.11 cannot trace the question
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "privateuseone")
AUTOCAST = frozenset(device for device in DEVICES if torch.amp.is_autocast_available(device))
P = ParamSpec("P")
R = TypeVar("R")


class _Switch:
    """A process-wide switch of torch that several threads turn at once: the last one to leave restores it."""

    def __init__(self, backend: Any) -> None:
        self._backend, self._lock, self._inside, self._kept = backend, threading.Lock(), 0, ""

    def is_reduced(self) -> bool:
        return self._inside > 0 or self._backend.fp32_precision in REDUCED

    @contextmanager
    def exact(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._kept = self._backend.fp32_precision
                self._backend.fp32_precision = "ieee"
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._backend.fp32_precision = self._kept


_CUDA = _Switch(torch.backends.cuda.matmul)
_CPU = _Switch(torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]


def with_exact_products(function: Callable[P, R], device: str) -> Callable[P, R]:
    """Return `function` with float32 matrix products on `device` that use neither TF32 nor bfloat16.

    Where the user allows neither, it is `function` itself, and nothing is written. Otherwise the switch is the
    process's: while one thread is inside, an f in another thread has exact products, too.
    """
    switch = _CUDA if device == "cuda" else _CPU
    return switch.exact()(function) if switch.is_reduced() else function


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast; a device that has none, such as meta, is left alone."""
    return torch.autocast(device, enabled=False) if device in AUTOCAST else nullcontext()


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of the autocast that is active on `device`; None where none is."""
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
