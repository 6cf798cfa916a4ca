"""Folders of the data sets, the cache folder for downloads and decoded copies, and how a file is put there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

VARIABLE = "PHANTOM_DATA"


def cache_folder() -> Path:
    """Return the folder for downloads and decoded copies: `$XDG_CACHE_HOME/phantom`, by default ~/.cache/phantom.

    Of a user without a home, as in some containers, it lies among the temporary files.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phantom"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"phantom-{os.getuid()}"


def data_root(root: str | None, name: str) -> Path:
    """Return the folder of the set `name`: `root` if given, else $PHANTOM_DATA/<name>, else one in the cache folder."""
    if root is not None:
        return Path(root).expanduser()
    base = os.environ.get(VARIABLE)
    return Path(base).expanduser() / name if base else cache_folder() / "data" / name


def root_hint(name: str) -> str:
    """Return the sentence that tells the user how to set the folder of the set `name`."""
    return f"Set the folder with data.root=<folder>, or set {VARIABLE} to the parent of a folder called {name}"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: no reader sees a partial file.

    Its content is on the disk before it has its name, so that a power cut leaves no partial file either.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    # a link of that name would lead the write to another file
    part.unlink(missing_ok=True)
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
