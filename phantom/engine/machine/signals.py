"""Signals that ask a run to stop: the first one is noted and answered at the next step boundary, a second one at once.

SIGTERM, SIGINT (Ctrl-C), SIGUSR2, SIGHUP (the terminal is gone) and SIGXCPU (a limit on CPU time) do. SIGUSR1 does not:
NCCL catches it. A SIGHUP that is ignored stays so: that is what nohup asks for.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from phantom.engine.machine import launcher

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
# seconds in which a second signal counts as the first one, sent along by who started the run and heard it, too
ECHO = 1.0


class Interrupted(SystemExit):
    """The end of a run that a signal asked for; the exit status is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def name_of(number: int) -> str:
    """Return a signal's name, such as SIGTERM."""
    return signal.Signals(number).name


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """Let a signal end this process with one sentence during the body: before and after training nothing is to save."""

    def end(number: int, frame: Any) -> None:
        _say(
            f"{name_of(number)}: the run ends; what was saved before is kept, and the same command goes on from there, "
            "unless it says resume=never"
        )
        raise Interrupted(number)

    before = _handle(end)
    try:
        yield
    finally:
        _restore(before)


def _handle(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Install a handler for `STOPPING`; return the handlers before. Only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    detached = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [number for number in STOPPING if not (number == signal.SIGHUP and detached)]
    return {number: signal.signal(number, handler) for number in heard}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


_listening = False


def _ignore_in_child() -> None:
    """Leave signals to the parent: what a forked worker writes to its pipe would count as a second signal there."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


class Interruption:
    """Hear signals during the body of `with`; outside it, and outside the main thread, nothing is caught.

    A thread hears them, because the main one may be inside a long call. It sets `number`, that of the first signal and
    0 before, and ends the process at the second one.
    """

    def __init__(self) -> None:
        self.number = 0
        self._first = 0.0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Interruption:
        global _listening
        self._before = _handle(lambda *_: None)
        if not self._before:
            return self
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        _listening = True
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        global _listening
        if self._pipe is None:
            return
        _listening = False
        signal.set_wakeup_fd(-1)
        os.close(self._pipe[1])  # which ends the thread
        self._pipe = None
        _restore(self._before)

    def _listen(self, pipe: int) -> None:
        while True:
            select.select([pipe], [], [])
            numbers = os.read(pipe, 64)  # one byte a signal, of every kind that Python handles
            if not numbers:
                os.close(pipe)
                return
            for number in numbers:
                if number in STOPPING:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._first = number, now
        elif not self._is_echo(number, now):
            _say(f"{name_of(number)}, the second signal: the run ends at once; what was saved before is kept")
            os._exit(128 + number)

    def _is_echo(self, number: int, now: float) -> bool:
        if number == self.number == signal.SIGXCPU:  # which comes again with every second of CPU time
            return True
        # a session that ends sends SIGHUP beside SIGTERM; of a terminal alone, the second Ctrl-C is always meant
        of_session = signal.SIGHUP in (number, self.number)
        sent_along = launcher.is_there() or of_session or number == self.number != signal.SIGINT
        return sent_along and now - self._first <= ECHO


def _say(text: str) -> None:
    """Print a line for all ranks; print() itself may be what the signal interrupted."""
    if launcher.rank() == 0 and sys.stderr is not None:  # None where it was closed
        with contextlib.suppress(OSError):  # the terminal is gone, or the pipe
            os.write(sys.stderr.fileno(), f"{text}\n".encode())


os.register_at_fork(after_in_child=_ignore_in_child)
