"""How long a run takes, over all its restarts: in all, and without what it does besides training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Wall clock of a run, in seconds; it stands still until `start`.

    total: all of it; training: without the bodies of `pause`. Work of a GPU counts where the host waits for it.
    """

    def __init__(self) -> None:
        self.total = self.training = 0.0
        self._paused = False
        self._last: float | None = None

    def start(self) -> None:
        """Begin to run, or go on after `load`."""
        self._last = time.monotonic()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the body as training."""
        self._add()
        self._paused = True
        try:
            yield
        finally:
            self._add()
            self._paused = False

    def state(self) -> dict[str, float]:
        """Return what `load` takes, up to now."""
        self._add()
        return {"total": self.total, "training": self.training}

    def load(self, state: Mapping[str, float] | float) -> None:
        """Take over the seconds of an earlier process; early checkpoints have one number, evaluations included."""
        found = state if isinstance(state, Mapping) else {"total": state, "training": state}
        self.total, self.training = found["total"], found["training"]

    def _add(self) -> None:
        if self._last is None:
            return
        now = time.monotonic()
        self.total += now - self._last
        self.training += 0.0 if self._paused else now - self._last
        self._last = now
