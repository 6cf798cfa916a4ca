"""Files that are written whole or not at all, and that survive a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole(path: Path, *, parents: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the body ends: a reader sees the old one or the new one.

    The new content is on the disk, and not only in the system's memory, before it replaces the old one.

    Args:
        parents: make the folders that are missing.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    # always the same name, so that the next writer replaces the file of a killed run
    temporary = path.with_suffix(".tmp")
    # a link of that name, in a folder from elsewhere, would lead the write to another file
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write a file as `whole` does, with the folders that are missing."""
    with whole(path) as file:
        file.write(content)


def read(path: Path) -> bytes:
    """Return the content of a file.

    A pipe or a device of that name, which may have no end, counts as none, and so does a link that leads nowhere.

    Raises:
        OSError: there is none (FileNotFoundError), or it cannot be read.
    """
    if not (path.is_file() or path.is_dir()):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return path.read_bytes()


def _sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk: a rename is an entry of the folder, not of the file."""
    with contextlib.suppress(OSError):  # some systems cannot sync a folder
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
