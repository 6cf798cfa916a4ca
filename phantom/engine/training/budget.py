"""How long a run is, and how often it looks and saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phantom.engine.errors import DataError
from phantom.engine.source import Source
from phantom.engine.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train, and how often to look.

    Args:
        epochs: passes over the training data.
        steps: stop after this number of optimiser steps, if it comes before the last epoch ends.
        eval_every: steps between evaluations; None evaluates at the end of each epoch.
        log_every: steps between training rows.
        checkpoint_every: steps between checkpoints, besides those of evaluations.
        keep_checkpoints: number of these to keep: last.pt, then last-1.pt, ...
        eval_splits: splits to evaluate; the headline metric of the first one selects the best checkpoint, and `best`
            in the record is what that checkpoint gives on all of them.
        target: stop at the first evaluation whose headline metric on the first split is as good; None trains to the
            end.
    """

    epochs: int
    steps: int | None
    eval_every: int | None
    log_every: int
    checkpoint_every: int | None
    keep_checkpoints: int
    eval_splits: tuple[str, ...]
    target: float | None = None

    def reached(self, best: Mapping[str, Mapping[str, float]], task: Task) -> bool | None:
        """Return whether the best evaluation, its metrics by split, is as good as the target; None without a target."""
        if self.target is None:
            return None
        found = best.get(self.eval_splits[0])
        if found is None:
            return False
        value = found[task.metric]
        return value >= self.target if task.mode == "max" else value <= self.target

    def total(self, source: Source) -> int:
        """Return the number of optimiser steps of the whole budget.

        Raises:
            DataError: there is none.
        """
        length = sum(source.steps(epoch) for epoch in range(self.epochs))
        if length < 1:
            raise DataError(
                f"{type(source).__name__}.steps promises {length} steps in {self.epochs} epochs: its training split is "
                "empty, or smaller than a batch that must be full"
            )
        return length if self.steps is None else min(length, self.steps)
