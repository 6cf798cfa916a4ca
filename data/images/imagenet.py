"""ImageNet (ILSVRC 2012) from its folder tree, decoded by worker processes.

Images are (B, 3, H, W) float32, normalised per channel.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.digests import fingerprint_of_tree
from data.images.tree import list_classes, list_pictures
from data.paths import data_root, root_hint
from data.seeding import generator, seed_of
from phantom.engine.errors import DataError
from phantom.engine.source import Shard, Source, Spec

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
log = logging.getLogger(__name__)


class ImageNet(Source):
    """ImageNet from a tree `train/<wnid>/*.JPEG`, `val/<wnid>/*.JPEG`; every folder of train/ is a class.

    Training: crop a random area in `scale` with an aspect in `ratio`, resize it to `crop` (antialiased bilinear), flip
    it with probability 1/2; the draws depend on (seed, epoch, index) alone. Evaluation: resize the short side to
    `resize`, take the centre `crop`.

    Args:
        root: folder of the tree. None means $PHANTOM_DATA/imagenet, or the cache folder without that variable. The
            loader downloads nothing.
        scale, ratio: the official code of the paper uses [0.1, 1] and [0.8, 1.25]; torchvision's defaults, used by the
            implicit baseline, are [0.08, 1] and [3/4, 4/3].
        workers: number of decoding processes; 0 decodes in the training process.

    Raises:
        DataError: the tree is missing or has another layout, or train and val differ in their classes.

    Source: Russakovsky et al., *ImageNet Large Scale Visual Recognition Challenge* (2015).
    """

    kind: ClassVar[str] = "image_classification"

    def __init__(
        self,
        *,
        root: str | None,
        batch_size: int,
        eval_batch_size: int,
        crop: int,
        resize: int,
        scale: Sequence[float],
        ratio: Sequence[float],
        workers: int,
        subset: int | None,
        test_subset: int | None,
        seed: int,
    ) -> None:
        folder = data_root(root, "imagenet")
        for split in ("train", "val"):
            if not (folder / split).is_dir():
                raise DataError(
                    f"no ImageNet in {folder}: {folder / split} is missing. Expected train/<wnid>/*.JPEG and "
                    f"val/<wnid>/*.JPEG. {root_hint('imagenet')}; request the images at https://image-net.org"
                )
        from torchvision.transforms import v2

        normalise = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        (least, most), (narrow, wide) = scale, ratio
        augment = v2.RandomResizedCrop(crop, scale=(least, most), ratio=(narrow, wide), antialias=True)
        classes, test_classes = (list_classes(folder / split) for split in ("train", "val"))
        if classes != test_classes:
            unmatched = sorted(set(classes) ^ set(test_classes))
            raise DataError(
                f"train and val in {folder} differ in the classes {', '.join(unmatched[:5])} ({len(unmatched)} in all)"
            )
        train, test = (_samples(folder / split, classes) for split in ("train", "val"))
        self._train = Pictures(train, v2.Compose([augment, v2.RandomHorizontalFlip(), *normalise]), seed)
        plain = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(crop), *normalise])
        self._evaluated = {"train": Pictures(train, plain, seed), "test": Pictures(test, plain, seed)}
        self._indices = {"train": _first(len(train), subset), "test": _first(len(test), test_subset)}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.workers, self.seed = workers, seed
        self.splits = ("train", "test")
        sizes = {name: len(indices) for name, indices in self._indices.items()}
        self.spec = Spec(
            kind=self.kind,
            inputs={"in_channels": 3, "num_classes": len(classes)},
            sizes=sizes,
            digests={
                name: fingerprint_of_tree(folder, (path for path, _ in found))
                for name, found in (("train", train), ("test", test))
            },
        )
        log.info("ImageNet in %s: %s images of %d classes", folder, sizes, len(classes))

    def steps(self, epoch: int) -> int:
        return -(-self.spec.sizes["train"] // self.batch_size)

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[tuple[Tensor, Tensor]]]:
        indices = self._indices["train"]
        order = indices[torch.randperm(len(indices), generator=generator(f"order/{self.seed}/{epoch}"))]
        shares, lengths = [], []
        for step in range(start, self.steps(epoch)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            parts = shard.parts(len(batch))
            shares += [[(epoch, int(i)) for i in batch[part.start : part.stop]] for part in parts]
            lengths.append(len(parts))
        batches = self._batches(self._train, shares)
        for length in lengths:
            yield [next(batches) for _ in range(length)]

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        self.check_split(split)
        indices = self._indices[split][shard.rank :: shard.world].tolist()
        size = self.eval_batch_size
        shares = [[(0, i) for i in indices[start : start + size]] for start in range(0, len(indices), size)]
        yield from self._batches(self._evaluated[split], shares)

    def _batches(self, pictures: Pictures, shares: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        options = {
            "num_workers": self.workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": _leave_signals,
        }
        try:
            # without this generator, DataLoader draws its workers' seeds from torch's global one
            yield from DataLoader(pictures, batch_sampler=shares, generator=torch.Generator(), **options)
        except DataError as error:
            # torch puts a worker's whole traceback into the message; its last line holds the class and our message
            prefix = f"{DataError.__module__}.{DataError.__qualname__}: "
            raise DataError(str(error).strip().splitlines()[-1].removeprefix(prefix)) from None


class Pictures(Dataset):
    """Decode and transform one picture; `key` is (epoch, index), and the random draws depend on it and the seed."""

    def __init__(self, samples: list[tuple[str, int]], transform: Callable[[Any], Tensor], seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        epoch, index = key
        path, label = self.samples[index]
        try:
            with Image.open(path) as picture:
                picture = picture.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise DataError(f"the picture {path} is damaged and cannot be decoded ({error})") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(f"augment/{self.seed}/{epoch}/{index}"))
            return self.transform(picture), label


def _leave_signals(worker: int) -> None:
    """Leave signals to the parent: a scheduler sends them to every process, and the parent saves first."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _samples(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Return (file, label) of every picture of a split, by classes.

    Raises:
        DataError: there is no class, or one has no picture.
    """
    files = [list_pictures(folder / name, SUFFIXES) for name in classes]
    empty = [str(folder / name) for name, found in zip(classes, files, strict=True) if not found]
    if empty or not classes:
        what = f"no picture ({', '.join(SUFFIXES)}) in the class folder {empty[0]}" if empty else f"{folder} is empty"
        raise DataError(f"{what}: every folder of train/ and val/ is a class, and holds its pictures")
    return [(str(path), label) for label, found in enumerate(files) for path in found]


def _first(total: int, count: int | None) -> Tensor:
    if count is None or count >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=generator("subset"))[:count]
