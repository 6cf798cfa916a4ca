"""One run, one writer: a lock in the run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from phantom.engine.artifacts.provenance import now
from phantom.engine.errors import LockedError

NAME = "run.lock"
WAIT = 10.0  # seconds: ranks that have lost their launcher need some to save and leave
log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the only writer of `folder` during the body; the folder must exist.

    The system's own file lock (flock) decides, and goes with the process that holds it: a lock file that a killed run
    left behind locks nothing. Between machines it is as good as the file system: NFS passes flock on to its server;
    where a file system has no flock at all, filelock leaves a marker with host and process instead.

    Another writer has some seconds to end.

    Raises:
        LockedError: another process still holds the folder; names it, and its machine.
    """
    path = folder / NAME
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s writes to %s: waiting up to %.0f s for it", _holder(path), folder, WAIT)
        try:
            lock.acquire(timeout=WAIT)
        except Timeout:
            raise LockedError(
                f"{_holder(path)} writes to {folder}, and a run has one writer: wait for it, end it, or name another "
                "folder with runs=<folder>"
            ) from None
    try:
        path.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now()}), "utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_bytes())
        return f"process {found['process']} on {found['host']}, since {found['since']},"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        return "another process"
