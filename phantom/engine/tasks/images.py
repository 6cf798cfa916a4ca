"""Image classification: cross entropy and top-1 accuracy."""

from __future__ import annotations

from typing import Any

from torch import nn

from phantom.engine.tasks.base import Score, Tally, Task, classification_report, classification_tally, outputs_of


class ImageClassification(Task):
    """Score (images (B, C, H, W), labels (B,)) by the cross entropy of `model(images)`; counts images."""

    kind = "image_classification"
    unit = "images"
    metric = "accuracy"
    mode = "max"
    fixed_shapes = True

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        images, labels = batch
        logits, solutions = outputs_of(model, images)
        return Score(classification_tally(logits, labels), solutions, None)

    def report(self, tally: Tally) -> dict[str, float]:
        return classification_report(tally)
