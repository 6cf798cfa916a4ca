"""What measures a training step: a clock, and a tracer of operators, synchronisations and memory.

Both offer `phase(name)`, the hook that `DEQ.clock` takes. A phase owns what happens in it and not in a phase nested
inside, so that the phases of a step add up to the step.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ClockKind = Literal["wall", "cpu"]

# operators after which the host waits for the device: their result, or the shape of it, is needed on the host
_SYNCS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.equal",
    "aten._linalg_check_errors",
    "aten._unique2",
}


class Span(NamedTuple):
    """A timed phase, inside the phase `parent`."""

    name: str
    parent: str | None
    begin: Any
    end: Any


class Clock:
    """Measure phases in seconds: wall time, CPU time of this process, or events on a GPU.

    CPU time is the honest clock on a machine that others use too, with one thread: waiting is not counted.
    """

    def __init__(self, kind: ClockKind, device: torch.device) -> None:
        if kind not in ("wall", "cpu"):
            raise ValueError(f"clock={kind!r} is not known; choose wall or cpu")
        if device.type == "cuda" and kind == "cpu":
            raise ValueError("clock='cpu' does not see the work of a GPU; use clock='wall' there, which reads events")
        self._device = device
        self._now = time.perf_counter if kind == "wall" else time.process_time
        self._spans: list[Span] = []
        self._open: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body as `name`, without the phases nested in it."""
        parent, self._open = self._open, name
        begin = self._mark()
        try:
            yield
        finally:
            self._spans.append(Span(name, parent, begin, self._mark()))
            self._open = parent

    def take(self) -> dict[str, float]:
        """Return the seconds of every phase since the last call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for span in self.take_marks():
            cuda = self._device.type == "cuda"
            length = span.begin.elapsed_time(span.end) / 1e3 if cuda else span.end - span.begin
            seconds[span.name] += length
            if span.parent is not None:
                seconds[span.parent] -= length
        return dict(seconds)

    def take_marks(self) -> list[Span]:
        """Remove and return what was timed since the last call, as `StepGraphs` needs it."""
        spans, self._spans = self._spans, []
        return spans

    def add_marks(self, marks: list[Span]) -> None:
        """Count `marks`, those of a captured graph, which every replay times anew."""
        self._spans = [*self._spans, *marks]

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return self._now()
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event


class Tracer(TorchDispatchMode):
    """Count operators and host synchronisations by phase, and the peak of live bytes by the phase that made them.

    Exact on every device: it follows each storage from the operator that allocates it to its release. Views are not
    counted as operators. Compiled code is one opaque call to it, so trace eager variants.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.evals: Counter[str] = Counter()
        self.peak: dict[str, int] = defaultdict(int)
        self.peak_total = 0
        self._live: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._stack = ["rest"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the body to `name`, without the phases nested in it."""
        self._stack.append(name)
        try:
            yield
        finally:
            self._stack.pop()

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
        self.peak_total = max(self.peak_total, self._live.total())
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
