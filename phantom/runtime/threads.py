"""A setting of the whole process, made by several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


class Shared:
    """A setting that holds while a thread is inside: the first one to enter makes it, the last one to leave undoes it.

    Args:
        make: returns the context manager that makes the setting.
    """

    def __init__(self, make: Callable[[], AbstractContextManager]) -> None:
        self._make, self._lock, self._inside, self._kept = make, threading.Lock(), 0, ExitStack()

    @property
    def is_made(self) -> bool:
        return self._inside > 0

    @contextmanager
    def inside(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._kept.enter_context(self._make())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._kept.close()
