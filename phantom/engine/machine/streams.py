"""stdout and stderr of a program that works for hours: what only shows something must not end it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

GONE = (errno.EPIPE, errno.EIO)  # of a pipe whose reader has ended, and of a terminal that was closed
failed: dict[str, OSError] = {}  # by the name of the stream, what else it could not take


def prepare() -> None:
    """Let stdout and stderr write any character, and go silent for good where nothing takes what they write.

    That is a pipe whose reader has ended (`| head`), a terminal that was closed, or a disk that is full. Python's own
    streams raise there, in whatever line happens to print.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed before the program began
            stream.reconfigure(errors="replace")  # a table has characters that ASCII lacks
            with contextlib.suppress(OSError):  # a reader that is slow shall be waited for
                os.set_blocking(stream.fileno(), True)
            for name in ("write", "flush"):
                # the method of its class, so that a second call wraps nothing twice
                setattr(stream, name, partial(_attempt, stream, getattr(type(stream), name)))


def check_result() -> None:
    """End with status 1 where stdout, which is the result of the program, could not take all of it.

    Where its reader has ended, it wanted no more.
    """
    print(end="", flush=True)
    if error := failed.get("<stdout>"):
        sys.exit(f"error: stdout could not take the whole result: {error.strerror}")


def _attempt(stream: Any, method: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return method(stream, *arguments)
    except OSError as error:
        if error.errno not in GONE:
            failed[stream.name] = error
        # what is still in the buffer, and what other code writes to this number, goes nowhere, too
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        return None
