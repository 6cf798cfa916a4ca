"""A map that writes to its argument, as a cell that begins with `ReLU(inplace=True)`, is made a function of it."""

from __future__ import annotations

import torch
from torch import Tensor

from phantom.runtime.host import is_on_host, is_traced
from phantom.state import FlatMap


class Pure:
    """Call f so that it cannot change the state it is given.

    The first call hands f a copy, and sees by torch's version counter whether f writes to it; if so, every call does.
    On a CPU it also compares the numbers: what writes through `.data` or numpy is not counted. A map that begins to
    write later is an error: the state it was given is lost.

    Args:
        f: map of (B, D) tensors.
        writes: whether f writes to its argument; None where that is not known yet.
        frozen: the same map, whose value has a graph to z alone; see `phantom.runtime.frozen`.
    """

    def __init__(self, f: FlatMap, writes: bool | None = None, frozen: FlatMap | None = None) -> None:
        self.f, self.writes, self.frozen, self._has_versions = f, writes, frozen, None

    def __call__(self, z: Tensor) -> Tensor:
        first = self._has_versions is None
        if first and is_traced(z):
            return self.f(z.clone())
        if first:
            self._has_versions = not torch.is_inference_mode_enabled()
        if self.writes:
            return self.f(z.clone())
        given = z
        if self.writes is None:
            z = _counted_copy(z)
        elif not self._has_versions:
            return self.f(z)
        before = z._version
        fz = self.f(z)
        if self.writes is None:
            self.writes = z._version != before or (is_on_host(given) and not torch.equal(given, z))
        elif z._version != before:
            raise RuntimeError(
                "f wrote to its argument at a later evaluation than the first, where it did not: the state is lost. "
                "Begin f with z = z.clone(), or use the out-of-place operations (relu, not relu_)"
            )
        return fz


def pure(f: FlatMap) -> Pure:
    """Return `f` as a `Pure` map; one that is so already keeps what it knows."""
    return f if isinstance(f, Pure) else Pure(f)


def _counted_copy(z: Tensor) -> Tensor:
    if not torch.is_inference_mode_enabled():
        return z.clone()
    with torch.inference_mode(False):
        return z.clone()
