"""A fixed part of CIFAR-10 at a lower resolution: the budget of a few CPU cores, and no published benchmark."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.digests import digest
from data.images.base import ImageSet, InMemoryImages
from data.images.cifar10 import CIFAR10, CLASSES, DIGESTS, OTHER, read
from data.paths import data_root
from phantom.validate import check_count

SIDE = 32
log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class CIFAR10Small(InMemoryImages):
    """As many images of every class of CIFAR-10, each pixel the mean of a square of released pixels.

    A class's images are those whose hashes of the released pixels are smallest, in that order: the same images and the
    same batches from every layout of the files.

    Args:
        root, download, allow_partial: see `CIFAR10`.
        size: pixels a side, a divisor of 32; the mean over a square is rounded to a byte.
        num_train, num_test: images of each split, multiples of 10.

    Raises:
        ValueError: `size` does not divide 32, or a number is no multiple of 10.
        DataError: see `CIFAR10`.
    """

    num_classes = CIFAR10.num_classes
    # a mean over squares keeps the mean of all pixels; the scale is kept, too, so that nothing but the images differs
    mean = CIFAR10.mean
    std = CIFAR10.std

    root: str | None
    download: bool
    allow_partial: bool
    size: int
    num_train: int
    num_test: int

    def __post_init__(self) -> None:
        check_count("size", self.size, least=1)
        if SIDE % self.size:
            raise ValueError(
                f"size={self.size!r} must divide {SIDE}, as 16 or 8: a pixel is the mean of a whole square"
            )
        for name, value in (("num_train", self.num_train), ("num_test", self.num_test)):
            check_count(name, value, least=len(CLASSES))
            if value % len(CLASSES):
                raise ValueError(
                    f"{name}={value!r} must be a multiple of {len(CLASSES)}: every class has as many images"
                )
        super().__post_init__()

    def load(self) -> tuple[ImageSet, ImageSet]:
        found = read(data_root(self.root, "cifar10"), download=self.download, allow_partial=self.allow_partial)
        sets = dict(zip(DIGESTS, found, strict=True))
        hashes = {split: images.hashes() for split, images in sets.items()}
        if {split: digest(sorted(each)) for split, each in hashes.items()} != DIGESTS:
            log.warning(OTHER)
        chosen = (
            _first_of_every_class(sets[split], hashes[split], count // len(CLASSES))
            for split, count in (("train", self.num_train), ("test", self.num_test))
        )
        train, test = (part._replace(images=shrink(part.images, self.size)) for part in chosen)
        return train, test


def shrink(images: Tensor, size: int) -> Tensor:
    """Return images (N, C, H, W) uint8 of `size` x `size` pixels, each the mean of a square, rounded to a byte."""
    return F.avg_pool2d(images.float(), images.shape[-1] // size).round().to(images.dtype)


def _first_of_every_class(images: ImageSet, hashes: list[bytes], count: int) -> ImageSet:
    """Return `count` images of every class, those of the smallest hashes; all where a class has fewer."""
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    labels = images.labels.tolist()
    chosen = [[i for i in order if labels[i] == label][:count] for label in range(len(CLASSES))]
    return images.take(torch.tensor([i for own in chosen for i in own]))
