"""CIFAR-10: 60,000 colour images of 32 x 32 pixels in ten classes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from data.images.base import ImageSet, InMemoryImages
from data.images.decoded_cache import read_split
from data.paths import data_root, root_hint
from phantom.engine.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 50_000, "test": 10_000}
# digests of the released pixels and labels, which do not depend on the file format
DIGESTS = {"train": "0237a5cd46bb6295", "test": "8b2eb67a9babea79"}
OTHER = (
    "CIFAR-10: these are not the images as released, but a subset or re-encoded copies; "
    "accuracies are not comparable with published ones (JPEG copies lower them)"
)
log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class CIFAR10(InMemoryImages):
    """CIFAR-10 from torchvision's canonical files or from an image-folder tree, whichever the root holds.

    Args:
        root: folder with `cifar-10-batches-py/`, or with pictures in `train/<class>/` and `test/<class>/`. None means
            $PHANTOM_DATA/cifar10, or the cache folder without that variable.
        download: download the canonical files into `root` if it holds neither.
        allow_partial: accept other numbers of images than 50,000 and 10,000.

    Raises:
        DataError: `root` holds neither layout, a file is damaged, or the counts are wrong.

    Source: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images* (2009).
    """

    num_classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    # the official code's constants; they are not the standard deviation of all pixels (0.247, 0.243, 0.262)
    std = (0.2023, 0.1994, 0.2010)

    root: str | None
    download: bool
    allow_partial: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spec.digests != DIGESTS:
            log.warning(OTHER)

    def load(self) -> tuple[ImageSet, ImageSet]:
        return read(data_root(self.root, "cifar10"), download=self.download, allow_partial=self.allow_partial)


def read(root: Path, *, download: bool, allow_partial: bool) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test images that `root` holds, in the order of its files.

    Raises:
        DataError: see `CIFAR10`.
    """
    if all((root / split).is_dir() for split in COUNTS):
        log.info("CIFAR-10: image-folder tree in %s", root)
        sets = {split: read_split(root / split, CLASSES, (32, 32)) for split in COUNTS}
    elif (root / "cifar-10-batches-py").is_dir() or download:
        if download:
            _fetch(root)
        log.info("CIFAR-10: canonical files in %s", root)
        sets = {split: _canonical(root, split) for split in COUNTS}
    else:
        there = "does not exist" if not root.is_dir() else "holds neither"
        raise DataError(
            f"no CIFAR-10 in {root}, which {there}. Expected cifar-10-batches-py/ (torchvision's files), or "
            f"train/<class>/*.png and test/<class>/*.png with the classes {', '.join(CLASSES)}. "
            f"{root_hint('cifar10')}, or download it with data.download=true"
        )
    for split, count in COUNTS.items():
        got = len(sets[split].labels)
        if got != count and not allow_partial:
            raise DataError(
                f"CIFAR-10 in {root} has {got} {split} images, expected {count}: complete it, or set "
                "data.allow_partial=true"
            )
        log.info("CIFAR-10: %d %s images", got, split)
    return sets["train"], sets["test"]


def _fetch(root: Path) -> None:
    """Download what is missing or damaged of the canonical files."""
    from torchvision import datasets

    try:
        datasets.CIFAR10(str(root), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded to {root} ({error}): connect to the network, or copy "
            f"cifar-10-batches-py/ there from another machine. {root_hint('cifar10')}"
        ) from error


def _canonical(root: Path, split: str) -> ImageSet:
    from torchvision import datasets

    try:
        official = datasets.CIFAR10(str(root), train=split == "train")
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            f"the files in {root / 'cifar-10-batches-py'} are not CIFAR-10 as released ({error}): remove them and "
            "download them again with data.download=true"
        ) from error
    images = torch.from_numpy(official.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(official.targets))
