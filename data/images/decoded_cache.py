"""An image-folder tree of small pictures, decoded once and kept as arrays in the cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.arrays import load_array, save_array
from data.images.base import ImageSet
from data.images.decoding import decode
from data.images.tree import list_classes, list_pictures, read_picture
from data.paths import cache_folder
from phantom.engine.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")
log = logging.getLogger(__name__)


def read_split(folder: Path, classes: Sequence[str], size: tuple[int, int]) -> ImageSet:
    """Read `folder`/<class>/*.{jpg,jpeg,png}, colour pictures of `size` (H, W), with labels by position in `classes`.

    The loader keeps the decoded array in the cache folder, under a fingerprint of the paths, sizes and times of all
    files: it decodes a changed tree again, and so it does where the kept array is damaged.

    Raises:
        DataError: a class folder is missing, unknown or empty; a picture is damaged or of another size.
    """
    found = list_classes(folder)
    if found != sorted(classes):
        raise DataError(
            f"{folder} must hold one folder for each of {', '.join(classes)}; it holds {', '.join(found) or 'none'}"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        pictures = list_pictures(folder / name, SUFFIXES)
        if not pictures:
            raise DataError(f"{folder / name} holds no picture ({', '.join(SUFFIXES)})")
        files += pictures
        labels += [label] * len(pictures)
    cached = cache_folder() / "decoded" / f"{_fingerprint(files)}.npy"
    if (kept := load_array(cached)) is not None:
        images = np.array(kept)
    else:
        log.info("decoding %d pictures in %s; later runs read the cached copy", len(files), folder)
        images = np.stack([_decode(path, size) for path in files])
        _save(cached, images)
    return ImageSet(torch.from_numpy(images), torch.tensor(labels))


def _decode(path: Path, size: tuple[int, int]) -> np.ndarray:
    pixels = decode(read_picture(path), str(path))
    height, width = pixels.shape[1:]
    if (height, width) != size:
        raise DataError(f"the picture {path} is {width} x {height} pixels, expected {size[1]} x {size[0]}")
    return pixels.numpy()


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(os.fsencode(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return digest.hexdigest()[:32]


def _save(path: Path, array: np.ndarray) -> None:
    """Write `array`. If the folder is not writable, only warn: the next run decodes again."""

    def fill(part: Path) -> None:
        with open(part, "wb") as file:
            np.save(file, array)

    try:
        save_array(path, fill)
    except OSError as error:
        log.warning("cannot cache the decoded pictures: %s", error)
