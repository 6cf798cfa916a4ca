"""Folder trees of pictures, one folder a class: what counts as a class, and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from data.digests import fingerprint_of_tree
from data.images.decoding import Example
from phantom.engine.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Tree:
    """The pictures of one split of ImageNet's tree, `train/<wnid>/*.JPEG` or `val/<wnid>/*.JPEG`, by index.

    Raises:
        DataError: there is no class, or one has no picture.
    """

    def __init__(self, root: Path, split: str) -> None:
        folder = root / split
        self.classes = list_classes(folder)
        files = [list_pictures(folder / name, SUFFIXES) for name in self.classes]
        empty = [str(folder / name) for name, found in zip(self.classes, files, strict=True) if not found]
        if empty or not self.classes:
            what = (
                f"no picture ({', '.join(SUFFIXES)}) in the class folder {empty[0]}" if empty else f"{folder} is empty"
            )
            raise DataError(f"{what}: every folder of train/ and val/ is a class, and holds its pictures")
        self.samples = [(str(path), label) for label, found in enumerate(files) for path in found]
        self.digest = fingerprint_of_tree(root, (path for path, _ in self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        path, label = self.samples[index]
        return Example(read_picture(Path(path)), label, path)


def read_picture(path: Path) -> bytes:
    """Return the bytes of a picture's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the picture {path} is damaged and cannot be decoded ({error.strerror})") from error


def list_classes(folder: Path) -> list[str]:
    """Return the names of the class folders in `folder`, sorted.

    A hidden folder, such as .ipynb_checkpoints, is none; nor is a link to `folder` itself or to one that contains it.

    Raises:
        DataError: the folder cannot be listed.
    """
    return [path.name for path in _list(folder) if path.is_dir() and not _leads_back(path, folder)]


def list_pictures(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files below `folder` whose names end in one of `suffixes`, in whatever case: sorted, by folders.

    Links to folders are followed, but for those that lead back; hidden files and folders are left out.

    Raises:
        DataError: a folder cannot be listed, or what has the name of a picture is no file.
    """
    found: dict[str, list[Path]] = {}
    chain: list[tuple[Path, frozenset[str]]] = [(folder, frozenset())]
    while chain:
        here, above = chain.pop()
        above |= {os.path.realpath(here)}
        pictures = found.setdefault(str(here), [])
        for path in _list(here):
            if path.is_dir():
                if os.path.realpath(path) not in above and not _leads_back(path, here):
                    chain.append((path, above))
            elif path.name.lower().endswith(tuple(suffixes)):
                if not path.is_file():
                    reason = "is a link that leads nowhere" if path.is_symlink() else "is no file"
                    raise DataError(f"the picture {path} {reason}: correct or remove it")
                pictures.append(path)
    return [path for name in sorted(found) for path in found[name]]


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read ({error.strerror}): correct its permissions") from error


def _leads_back(path: Path, folder: Path) -> bool:
    """Return whether `path`, an entry of `folder`, is a link to `folder` or to a folder that contains it."""
    return path.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))
