"""Full float32 arithmetic for a solver, whatever the user allows f: exact products, and no autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch

from phantom.runtime.threads import Shared

REDUCED = ("tf32", "bf16")
# devices with autocast, asked for once: the compiler of torch 2.11 cannot trace the question
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "privateuseone")
AUTOCAST = frozenset(device for device in DEVICES if torch.amp.is_autocast_available(device))
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def _exact(backend: Any) -> Iterator[None]:
    kept = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = kept


_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
_CUDA, _CPU = ((backend, Shared(partial(_exact, backend))) for backend in _BACKENDS)


def with_exact_products(function: Callable[P, R], device: str) -> Callable[P, R]:
    """Return `function` with float32 matrix products on `device` that use neither TF32 nor bfloat16.

    Where the user allows neither, it is `function` itself, and nothing is written. Otherwise the switch is the
    process's: while one thread is inside, an f in another thread has exact products, too.
    """
    backend, exact = _CUDA if device == "cuda" else _CPU
    return exact.inside()(function) if exact.is_made or backend.fp32_precision in REDUCED else function


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast; a device that has none, such as meta, is left alone."""
    return torch.autocast(device, enabled=False) if device in AUTOCAST else nullcontext()


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of the autocast that is active on `device`; None where none is."""
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
