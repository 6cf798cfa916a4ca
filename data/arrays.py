"""Arrays that are kept in the cache folder; one that is not as it was written counts as none."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.paths import write_atomically

HASH = hashlib.sha256().digest_size
log = logging.getLogger(__name__)


def save_array(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write an array as NumPy's .npy, and add the SHA-256 of that file to its end."""

    def write(part: Path) -> None:
        fill(part)
        with open(part, "rb+") as file:
            file.write(hashlib.file_digest(file, "sha256").digest())

    write_atomically(path, write)


def load_array(path: Path) -> np.ndarray | None:
    """Return the array that `save_array` wrote, memory-mapped; None where there is none, or where it is damaged."""
    if not path.is_file():
        return None
    with contextlib.suppress(OSError, ValueError):  # it cannot be read, or is empty
        content = np.memmap(path, dtype=np.uint8, mode="r")
        if hashlib.sha256(content[:-HASH].data).digest() == content[-HASH:].tobytes():
            return np.load(path, mmap_mode="r", allow_pickle=False)
    log.warning("%s is damaged, or of an earlier version: it is made again", path)
    return None
