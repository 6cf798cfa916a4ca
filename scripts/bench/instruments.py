"""A tracer of operators, their work, synchronisations and memory: it takes the place of a step's timer."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.bench import traffic

# operators after which the host waits for the device: their result, or the shape of it, is needed on the host
_SYNCS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.equal",
    "aten._linalg_check_errors",
    "aten._unique2",
}


class Tracer(TorchDispatchMode):
    """Count operators and host synchronisations by phase, and the peak of live bytes by the phase that made them.

    `flops`, by number format, and `moved`, in bytes, are those of all operators: see scripts/bench/traffic.py.

    Exact on every device: it follows each storage from the operator that allocates it to its release. Views are not
    counted as operators. Compiled code is one opaque call to it, so trace eager variants.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.evals: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.moved = 0
        self.peak: dict[str, int] = defaultdict(int)
        self.peak_total = 0
        self.peak_gradient = 0  # of all that is alive once a phase `attach` has begun
        self._live: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._stack = ["step"]
        self._solved = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the body to `name`, without the phases nested in it."""
        self._stack.append(name)
        self._solved = self._solved or name == "attach"
        try:
            yield
        finally:
            self._stack.pop()

    def end_step(self, items: int) -> None:
        """Nothing to close: a tracer counts until it is left."""

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Mark one evaluation of f: memory it allocates during a solve is not the solver's."""
        outer = self._stack[-1]
        self.evals[outer] += 1
        with self.phase("solve_f") if outer == "solve" else self.phase(outer):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = self._stack[-1]
        if not func.is_view:
            self.ops[name] += 1
        self.moved += traffic.bytes_of(func, args, kwargs or {}, out)
        found = traffic.flops_of(func, args, kwargs or {}, out)
        if found is not None:
            self.flops[str(found[0]).removeprefix("torch.")] += found[1]
        if _synchronises(func, args, out):
            self.syncs[name] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf, name)
        return out

    def _follow(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or size == 0:
            return
        self._seen.add(key)
        self._live[name] += size
        self.peak[name] = max(self.peak[name], self._live[name])
        total = self._live.total()
        self.peak_total = max(self.peak_total, total)
        if self._solved:
            self.peak_gradient = max(self.peak_gradient, total)
        weakref.finalize(storage, self._release, key, name, size)

    def _release(self, key: int, name: str, size: int) -> None:
        self._seen.discard(key)
        self._live[name] -= size


def _synchronises(func: Any, args: Any, out: Any) -> bool:
    name = str(func.overloadpacket)
    if name in _SYNCS:
        return True
    if name == "aten._to_copy":
        return out.device != args[0].device
    if name in ("aten.index", "aten.index_put_", "aten.index_put"):
        return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
    return False
