"""Learning-rate schedules: the factor on the base rate as a function of the step, and nothing else.

t is the 0-based optimiser step, T the number of steps of the run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from phantom.validate import check_count, check_number


class Schedule(ABC):
    """A learning rate as a function of the step. It holds no state, so a resumed run continues exactly."""

    @abstractmethod
    def rate(self, t: int, *, base: float, total: int, epoch: int) -> float:
        """Return the learning rate of step `t` of `total`, in 0-based `epoch`, for the optimiser's own `base` rate."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Keep the base rate."""

    def rate(self, t: int, *, base: float, total: int, epoch: int) -> float:
        return base


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Anneal per step: floor + (base - floor) (1 + cos(pi t / T)) / 2, after an optional linear warm-up.

    During the warm-up the rate is base (t + 1) / W. (The official language scripts take their very first step at the
    full rate, and are one step behind this afterwards: not copied.) The cosine is measured from step 0, as they do, so
    it starts slightly below `base` after a warm-up. W keeps its share of the run: a run cut to T steps warms up for
    `warmup_steps * T / of_steps` steps.

    Args:
        floor: the rate at t = T (official vision code: 1e-6).
        warmup_steps: W of a full-length run.
        of_steps: the full length T that `warmup_steps` belongs to; None takes `warmup_steps` as it is.
    """

    floor: float = 0.0
    warmup_steps: int = 0
    of_steps: int | None = None

    def __post_init__(self) -> None:
        check_number("floor", self.floor, ">= 0")
        check_count("warmup_steps", self.warmup_steps, least=0)
        check_count("of_steps", self.of_steps, least=1, optional=True)

    def rate(self, t: int, *, base: float, total: int, epoch: int) -> float:
        warmup = share_of_run(self.warmup_steps, self.of_steps, total)
        if t < warmup:
            return base * (t + 1) / warmup
        return self.floor + (base - self.floor) * (1 + math.cos(math.pi * min(t, total) / total)) / 2


@dataclass(frozen=True, kw_only=True)
class EpochSteps(Schedule):
    """Multiply the base rate by `factor` at the start of each 0-based epoch in `epochs`."""

    epochs: tuple[int, ...]
    factor: float

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, (tuple, list)):
            raise ValueError(f"epochs={self.epochs!r} must be a list of epochs, such as [50]")
        for epoch in self.epochs:
            check_count("epochs", epoch, least=0)
        check_number("factor", self.factor, ">= 0")

    def rate(self, t: int, *, base: float, total: int, epoch: int) -> float:
        return base * self.factor ** sum(epoch >= start for start in self.epochs)


def share_of_run(steps: int, of_steps: int | None, total: int) -> int:
    """Return `steps` scaled from a run of `of_steps` to one of `total`, so that a shorter run keeps its proportions."""
    return steps if of_steps is None or of_steps == total else round(steps * total / of_steps)
