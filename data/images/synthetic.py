"""Generated pictures in the shape of a real set, for rehearsals where its files are not at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.images.base import ImageSet, InMemoryImages
from data.seeding import generator
from phantom.validate import check_counts


@dataclass(kw_only=True, eq=False)
class SyntheticImages(InMemoryImages):
    """Colour pictures (3, size, size): every class has a coarse pattern of its own, and every picture noise on top.

    A picture of class c is 128 + 64 P_c + 32 n, clipped to bytes: P_c is a standard normal 4 x 4 grid, enlarged, and n
    standard normal per pixel. Labels go round the classes, so that few pictures hold many of them.

    Args:
        num_classes, size: as the real set has them.
        num_train, num_test: pictures of each split.
        generation_seed: of all pictures; `seed` draws the order of training alone.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    num_classes: int
    size: int
    num_train: int
    num_test: int
    generation_seed: int

    def __post_init__(self) -> None:
        check_counts(least=1, num_classes=self.num_classes, size=self.size)
        check_counts(least=1, num_train=self.num_train, num_test=self.num_test)
        super().__post_init__()

    def load(self) -> tuple[ImageSet, ImageSet]:
        draws = generator(f"synthetic images/{self.generation_seed}")
        patterns = torch.randn(self.num_classes, 3, 4, 4, generator=draws)
        train, test = (self._draw(count, patterns, draws) for count in (self.num_train, self.num_test))
        return train, test

    def _draw(self, count: int, patterns: torch.Tensor, draws: torch.Generator) -> ImageSet:
        labels = torch.arange(count) % self.num_classes
        coarse = F.interpolate(patterns[labels], size=(self.size, self.size), mode="bilinear")
        noise = torch.randn(coarse.shape, generator=draws)
        return ImageSet((128 + 64 * coarse + 32 * noise).clamp(0, 255).to(torch.uint8), labels)
