"""Image classification: cross entropy and top-1 accuracy."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import nn

from phantom.engine.tasks.base import Score, Tally, Task


class ImageClassification(Task):
    """Score (images (B, C, H, W), labels (B,)) by the cross entropy of `model(images)`; counts images."""

    kind: ClassVar[str] = "image_classification"
    unit: ClassVar[str] = "images"
    metric: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["max", "min"]] = "max"
    fixed_shapes: ClassVar[bool] = True

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        images, labels = batch
        logits, solutions = model(images)
        loss = F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels, reduction="sum")
        correct = (logits.argmax(dim=1) == labels).sum()
        return Score(Tally(loss, labels.shape[0], {"correct": correct}), solutions, None)

    def report(self, tally: Tally) -> dict[str, float]:
        return {
            "loss": float(tally.loss_sum) / tally.count,
            "accuracy": 100.0 * float(tally.sums["correct"]) / tally.count,
        }
