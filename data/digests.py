"""Short hashes of what a data set reads, which a run keeps: the same name may stand for other data tomorrow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

LENGTH = 16  # hexadecimal digits


def digest(chunks: Iterable[bytes]) -> str:
    """Return a short hash of some bytes, cut into `chunks` anywhere."""
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()[:LENGTH]


def digest_of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a short hash of the values, wherever they are kept."""
    return digest(tensor.detach().cpu().numpy().tobytes() for tensor in tensors)


def digest_of_files(files: Iterable[Path]) -> str:
    """Return a short hash of the names and the content of files; it does not depend on their folder or order."""
    each = []
    for path in sorted(files, key=lambda path: path.name):
        with open(path, "rb") as file:
            each.append(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest(each)


def fingerprint_of_tree(root: Path, files: Iterable[str | Path]) -> str:
    """Return a short hash of the list of files below `root` and of their sizes.

    It reads no content, so that a million pictures take seconds: two pictures of one name and one size pass as the
    same.
    """
    lines = (f"{os.path.relpath(path, root)}\0{os.stat(path).st_size}\n" for path in files)
    return digest(line.encode(errors="surrogateescape") for line in sorted(lines))
