"""When to stop: after a number of seconds, or at the SIGTERM of a queue. Runs are told, and resume another time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

GRACE = 600.0  # seconds that a step and a checkpoint may take


class Stopped(RuntimeError):
    """A run ended because it was told to; it resumes where its last checkpoint stands."""


class Stop:
    """Tell the runs to end once, and remember it.

    Every process is sent SIGTERM: a run then saves a checkpoint at its next step and exits. One that has not ended
    after `GRACE` seconds is killed, and resumes at the checkpoint before.

    Args:
        after: seconds from now; None waits for SIGTERM alone.
    """

    def __init__(self, after: float | None = None) -> None:
        self._told = threading.Event()
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._timers: list[threading.Timer] = []
        if after is not None:
            self._in(after, self.now)

    @property
    def told(self) -> bool:
        """Whether it is time."""
        return self._told.is_set()

    def now(self) -> None:
        """Tell every run that is under way, and all that would begin; a second time would end them at once."""
        with self._lock:
            if self.told:
                return
            self._told.set()
            for process in self._processes:
                process.terminate()
        self._in(GRACE, self._kill)

    @contextlib.contextmanager
    def watching(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """Tell `process`, too, while the block runs."""
        with self._lock:
            self._processes.add(process)
            if self.told:
                process.terminate()
        try:
            yield
        finally:
            with self._lock:
                self._processes.discard(process)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Stop at SIGTERM, and at the Ctrl-C that a terminal sends, while the block runs; the timers end with it."""
        terminated = signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self.now).start())
        interrupted = signal.getsignal(signal.SIGINT)

        def interrupt(*_: object) -> None:
            # the terminal has told the runs, too, and a second signal would end them at once; the next one is Python's
            signal.signal(signal.SIGINT, interrupted)
            self._told.set()

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, terminated)
            signal.signal(signal.SIGINT, interrupted)
            for timer in self._timers:
                timer.cancel()

    def _in(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _kill(self) -> None:
        with self._lock:
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
