"""Generated pictures in the shape of a real set, for rehearsals where its files are not at hand."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from data.images.base import Augment, ImageSet, InMemoryImages
from data.seeding import generator
from phantom.validate import check_counts


class SyntheticImages(InMemoryImages):
    """Colour pictures (3, size, size): every class has a coarse pattern of its own, and every picture noise on top.

    A picture of class c is 128 + 64 P_c + 32 n, clipped to bytes: P_c is a standard normal 4 x 4 grid, enlarged, and n
    standard normal per pixel. Labels go round the classes, so that few pictures hold many of them.

    Args:
        num_classes, size: as the real set has them.
        num_train, num_test: pictures of each split.
        generation_seed: of all pictures; `seed` draws the order of training alone.
    """

    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.25, 0.25, 0.25)

    def __init__(
        self,
        *,
        num_classes: int,
        size: int,
        num_train: int,
        num_test: int,
        generation_seed: int,
        batch_size: int,
        eval_batch_size: int,
        augment: Augment,
        validation: int,
        subset: int | None,
        test_subset: int | None,
        seed: int,
    ) -> None:
        check_counts(least=1, num_classes=num_classes, size=size, num_train=num_train, num_test=num_test)
        self.num_classes, self._size, self._generation_seed = num_classes, size, generation_seed
        self._counts = (num_train, num_test)
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            augment=augment,
            validation=validation,
            subset=subset,
            test_subset=test_subset,
            seed=seed,
        )

    def load(self) -> tuple[ImageSet, ImageSet]:
        draws = generator(f"synthetic images/{self._generation_seed}")
        patterns = torch.randn(self.num_classes, 3, 4, 4, generator=draws)
        train, test = (self._draw(count, patterns, draws) for count in self._counts)
        return train, test

    def _draw(self, count: int, patterns: torch.Tensor, draws: torch.Generator) -> ImageSet:
        labels = torch.arange(count) % self.num_classes
        coarse = F.interpolate(patterns[labels], size=(self._size, self._size), mode="bilinear")
        noise = torch.randn(coarse.shape, generator=draws)
        return ImageSet((128 + 64 * coarse + 32 * noise).clamp(0, 255).to(torch.uint8), labels)
