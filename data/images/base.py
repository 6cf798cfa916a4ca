"""Image sets held in memory: seeded order, vectorised augmentation, splits.

N images of C channels and H x W pixels, as one uint8 tensor; batches are normalised float32.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from data.digests import digest
from data.seeding import generator
from phantom.engine.source import Shard, Source, Spec
from phantom.validate import check_choice, check_counts

Augment = Literal["none", "crop_flip"]
PADDING = 4


class ImageSet(NamedTuple):
    """Images (N, C, H, W) uint8 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> ImageSet:
        """Return the images at `indices`."""
        return ImageSet(self.images[indices], self.labels[indices])

    def hashes(self) -> list[bytes]:
        """Return a hash of the label and the pixels of every image."""
        pairs = zip(self.images.numpy(), self.labels.tolist(), strict=True)
        return [hashlib.sha256(f"{label} ".encode() + image.tobytes()).digest() for image, label in pairs]

    def digest(self) -> str:
        """Return a short hash of all pixels and labels; it does not depend on the order of the images."""
        return digest(sorted(self.hashes()))


@dataclass(kw_only=True, eq=False)
class InMemoryImages(Source):
    """A labelled image set small enough to keep in memory.

    The order of epoch e and the augmentation of each image in it depend on (seed, e) alone: not on the batch size, the
    rank, or the step at which a run resumed.

    Args:
        batch_size: images per optimiser step, over all processes.
        eval_batch_size: images per evaluation batch.
        augment: `none`, or `crop_flip`: zero-pad by 4 (black, before normalisation), crop back, flip with
            probability 1/2.
        validation: number of training images held out as the split `valid`; a fixed seed draws them.
        subset: maximum number of training images, after holding out.
        test_subset: maximum number of test images.
        seed: seed of order and augmentation.
    """

    kind = "image_classification"
    num_classes: int = field(init=False)  # by the class, or one of its own arguments
    mean: ClassVar[Sequence[float]]
    std: ClassVar[Sequence[float]]

    batch_size: int
    eval_batch_size: int
    augment: Augment
    validation: int
    subset: int | None
    test_subset: int | None
    seed: int

    def __post_init__(self) -> None:
        check_choice("augment", self.augment, get_args(Augment))
        check_counts(least=1, batch_size=self.batch_size, eval_batch_size=self.eval_batch_size)
        train, test = self.load()
        digests = {"train": train.digest(), "test": test.digest()}
        order = torch.randperm(len(train.labels), generator=generator("hold out"))
        self._sets = {"train": train, "test": test}
        self._scale = torch.tensor([self.mean, self.std])[:, :, None, None]
        if not 0 <= self.validation < len(order):
            raise ValueError(
                f"validation={self.validation!r} must be in [0, {len(order)}): fewer than the training images"
            )
        if self.validation:
            self._sets["valid"] = train.take(order[: self.validation].sort().values)
            self._sets["train"] = train.take(order[self.validation :].sort().values)
        self._sets["train"] = _first(self._sets["train"], self.subset, "subset")
        self._sets["test"] = _first(self._sets["test"], self.test_subset, "test_subset")
        self.splits: Sequence[str] = tuple(self._sets)
        self.spec = Spec(
            kind=self.kind,
            inputs={"in_channels": train.images.shape[1], "num_classes": self.num_classes},
            sizes={name: len(images.labels) for name, images in self._sets.items()},
            digests=digests,
        )

    @abstractmethod
    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return the train and the test set."""

    def steps(self, epoch: int) -> int:
        return -(-self.spec.sizes["train"] // self.batch_size)

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[tuple[Tensor, Tensor]]]:
        images, labels = self._sets["train"]
        count = len(labels)
        draws = generator(f"train/{self.seed}/{epoch}")
        order = torch.randperm(count, generator=draws).to(images.device)
        shifts = torch.randint(0, 2 * PADDING + 1, (count, 2), generator=draws).to(images.device)
        flips = (torch.rand(count, generator=draws) < 0.5).to(images.device)
        for step in range(start, self.steps(epoch)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            micro_batches = []
            for part in shard.parts(len(batch)):
                index = batch[part.start : part.stop]
                picked = images[index]
                if self.augment == "crop_flip":
                    picked = crop_flip(picked, shifts[index], flips[index])
                micro_batches.append((normalise(picked, self._scale), labels[index]))
            yield micro_batches

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        self.check_split(split)
        images, labels = self._sets[split]
        for part in shard.shares(len(labels), self.eval_batch_size):
            yield normalise(images[part.start : part.stop], self._scale), labels[part.start : part.stop]

    def to(self, device: torch.device) -> None:
        """Hold the images on `device` and build the batches there; their values do not change."""
        self._scale = self._scale.to(device)
        self._sets = {name: ImageSet(s.images.to(device), s.labels.to(device)) for name, s in self._sets.items()}


def normalise(images: Tensor, scale: Tensor) -> Tensor:
    """Return bytes (B, C, H, W) as float32: x / 255, less the mean of its channel, over its standard deviation.

    Args:
        scale: (2, C, 1, 1), the means and the standard deviations, on the images' device.
    """
    mean, std = scale
    return images.float().div_(255).sub_(mean).div_(std)


def crop_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Return images zero-padded by 4 and cropped back at `shifts` (B, 2) in [0, 8], mirrored if `flips` (B,)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (PADDING, PADDING, PADDING, PADDING))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 9, 9, H, W), a view
    cropped = windows[torch.arange(len(images), device=images.device), :, shifts[:, 0], shifts[:, 1]]
    return torch.where(flips[:, None, None, None], cropped.flip(3), cropped)


def _first(images: ImageSet, count: int | None, name: str) -> ImageSet:
    if count is None or count >= len(images.labels):
        return images
    order = torch.randperm(len(images.labels), generator=generator(name))
    return images.take(order[:count])
