"""The handwritten digits that ship with scikit-learn: 1,797 images of 8 x 8 pixels, no download."""

from __future__ import annotations

from typing import Any

import torch

from data.images.base import ImageSet, InMemoryImages

NUM_TEST = 360


class Digits(InMemoryImages):
    """Real handwritten digits, 1,437 for training and 360 for testing (one fixed split, stratified by class).

    Source: Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI repository, by scikit-learn.
    """

    num_classes = 10
    # mean and standard deviation of all training pixels, scaled to [0, 1]
    mean = (0.3054,)
    std = (0.3760,)

    def load(self) -> tuple[ImageSet, ImageSet]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()
        # the grey levels are 0 to 16: scale them to bytes
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).long()
        train, test = train_test_split(range(len(labels)), test_size=NUM_TEST, random_state=0, stratify=digits.target)
        return ImageSet(images[train], labels[train]), ImageSet(images[test], labels[test])
