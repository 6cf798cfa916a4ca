"""Time the phases of a training step: forward solve, attach, backward, optimiser, and the whole step.

On a GPU the phases are marked by events and read later, so timing adds no synchronisation.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from phantom.validate import check_choice

Clock = Literal["wall", "cpu"]
PHASES = ("solve", "attach", "backward", "optimizer", "step")
WINDOW = 2000


class Span(NamedTuple):
    """A timed phase, inside the phase `parent`."""

    name: str
    parent: str | None
    begin: Any
    end: Any


class StepTimer:
    """Collect the durations of named phases, in seconds, leaving out the first `warmup` steps.

    A step may enter a phase several times (micro-batches, several solves); the durations of one step add up.

    Args:
        clock: "wall", which reads events on a GPU, or "cpu", the time that this process spent on the CPU. CPU time is
            the honest clock on a machine that others use too, with one thread: waiting is not counted.

    Raises:
        ValueError: the clock is not known, or does not see the work of the device.
    """

    def __init__(self, device: torch.device, *, clock: Clock = "wall", warmup: int = 5) -> None:
        check_choice("clock", clock, get_args(Clock))
        if device.type == "cuda" and clock == "cpu":
            raise ValueError("clock='cpu' does not see the work of a GPU; use clock='wall' there, which reads events")
        self._cuda = device.type == "cuda"
        self._clock = time.perf_counter if clock == "wall" else time.process_time
        self._warmup = warmup
        self._open: str | None = None
        self._marks: list[Span] = []
        self._open_steps: list[tuple[list[Span], int | Tensor]] = []
        # a bounded window: the record of a long run describes its last steps
        self._steps: deque[tuple[dict[str, float], int]] = deque(maxlen=WINDOW)
        self._recent: list[tuple[dict[str, float], int]] = []
        self._count = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body as part of `name` in the current step."""
        parent, self._open = self._open, name
        begin = self._now()
        try:
            yield
        finally:
            self._marks.append(Span(name, parent, begin, self._now()))
            self._open = parent

    def take_marks(self) -> list[Span]:
        """Remove and return what was timed so far in the current step."""
        marks, self._marks = self._marks, []
        return marks

    def add_marks(self, marks: list[Span]) -> None:
        """Count `marks` to the current step: those of a captured graph; every replay records them again."""
        self._marks = [*self._marks, *marks]

    def take(self) -> dict[str, float]:
        """Return the seconds of every phase since the last call, without the phases nested in it: they add up.

        Waits for the device, and closes no step.
        """
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        taken = [*(span for marks, _ in self._open_steps for span in marks), *self.take_marks()]
        self._open_steps = []
        for span in taken:
            length = self._length(span)
            seconds[span.name] += length
            if span.parent is not None:
                seconds[span.parent] -= length
        return dict(seconds)

    def end_step(self, items: int | Tensor) -> None:
        """Close the current step, which processed `items` items; a tensor is read with the times."""
        self._open_steps.append((self.take_marks(), items))

    def recent(self) -> tuple[dict[str, float], float | None]:
        """Return mean seconds by phase, and items per second, of the timed steps since the last call.

        A phase is averaged over the steps that have it; without a step, the answer is {} and None. Reads events: call
        it where a sync is due anyway.
        """
        self._read()
        steps, self._recent = self._recent, []
        found = defaultdict(list)
        for seconds, _ in steps:
            for name, value in seconds.items():
                found[name].append(value)
        return {name: statistics.fmean(values) for name, values in found.items()}, _items_per_second(steps)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return per phase the median, the 10th and the 90th percentile in seconds, and n."""
        self._read()
        kept = [seconds for seconds, _ in self._steps]
        result = {}
        for name in PHASES:
            values = sorted(step[name] for step in kept if name in step)
            if values:
                result[name] = {
                    "median": statistics.median(values),
                    "p10": values[int(0.1 * (len(values) - 1))],
                    "p90": values[int(0.9 * (len(values) - 1))],
                    "n": len(values),
                }
        return result

    def throughput(self) -> float | None:
        """Return items per second of step time over the timed steps, on all ranks; None before the warm-up is over."""
        self._read()
        return _items_per_second(self._steps)

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        # inside a graph under capture an event must become a node of it, to be recorded by every replay
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def _length(self, span: Span) -> float:
        return span.begin.elapsed_time(span.end) / 1e3 if self._cuda else span.end - span.begin

    def _read(self) -> None:
        if self._open_steps and self._cuda:
            torch.cuda.synchronize()
        # an event of a graph holds the time of its last replay alone
        latest = {id(span.begin): i for i, (marks, _) in enumerate(self._open_steps) for span in marks}
        for i, (marks, items) in enumerate(self._open_steps):
            seconds: dict[str, float] = defaultdict(float)
            for span in marks:
                if latest[id(span.begin)] == i:
                    seconds[span.name] += self._length(span)
            self._count += 1
            if self._count > self._warmup:
                self._steps.append((dict(seconds), int(items)))
                self._recent.append(self._steps[-1])
        self._open_steps = []


def _items_per_second(steps: Iterable[tuple[dict[str, float], int]]) -> float | None:
    seconds = sum(step["step"] for step, _ in steps if "step" in step)
    return sum(items for _, items in steps) / seconds if seconds else None
