"""The course of a run: k and lam of the estimator, and the depth of the iteration, as functions of the step."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, cast

from phantom import BPTT, UPG, GradientEstimator, Solver
from phantom.engine.training.schedule import share_of_run
from phantom.validate import check_count, check_lam, check_number


class Value(ABC):
    """A number as a pure function of the step, the length of the run and the seed; the same on all processes."""

    @abstractmethod
    def at(self, step: int, total: int, seed: int) -> float:
        """Return the number for the 0-based `step` of `total`."""


@dataclass(frozen=True, kw_only=True)
class Ramp(Value):
    """Go from `first` to `last` in a straight line over the first `steps` steps, then stay.

    Counts are rounded down: k = first + floor((last - first) t / steps), the warm-up of HRM-Text (arXiv 2605.20613).

    Args:
        steps: length of the ramp in a full run.
        of_steps: length of that full run; a shorter run keeps the share. None takes `steps` as it is.
    """

    first: float
    last: float
    steps: int
    of_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("last", self.last)):
            check_number(name, value, "> 0")
        check_count("steps", self.steps, least=1)
        check_count("of_steps", self.of_steps, least=1, optional=True)

    def at(self, step: int, total: int, seed: int) -> float:
        steps = max(1, share_of_run(self.steps, self.of_steps, total))
        return self.first + (self.last - self.first) * min(1.0, step / steps)


@dataclass(frozen=True, kw_only=True)
class RandomDepth(Value):
    """Draw 1 + Poisson(rate), with a rate that is log-normal of mean `mean` - 1 and width `sigma` in the logarithm.

    Source: Geiping et al., *Scaling up test-time compute with latent reasoning* (arXiv 2502.05171), with sigma = 0.5.
    """

    mean: float
    sigma: float = 0.5

    def __post_init__(self) -> None:
        check_number("mean", self.mean, "(1, 500)", also=": the mean number of steps")
        check_number("sigma", self.sigma, ">= 0")

    def at(self, step: int, total: int, seed: int) -> int:
        draws = random.Random(f"depth/{seed}/{step}")
        rate = math.exp(draws.gauss(math.log(self.mean - 1) - self.sigma**2 / 2, self.sigma))
        count, time = 0, draws.expovariate(1.0)  # arrivals in an interval of length `rate`
        while time < rate:
            count, time = count + 1, time + draws.expovariate(1.0)
        return 1 + count


@dataclass(frozen=True, kw_only=True)
class Course:
    """Set k, lam and the depth before every training step; evaluation keeps the config's solver.

    Args:
        k: of UPG or NPG.
        lam: of UPG, NPG or BPTT.
        depth: steps of f behind the value of a training step, those with a graph included: the solver takes depth - k
            under UPG and depth - 1 under the estimators that evaluate f once; BPTT unrolls all of them. A UPG whose k
            exceeds the depth unrolls the depth.
    """

    k: Value | None = None
    lam: Value | None = None
    depth: Value | None = None

    def __post_init__(self) -> None:
        for name in ("k", "lam", "depth"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Value):
                raise TypeError(f"course.{name} must be a rule such as Ramp or RandomDepth, got {value!r}")

    def check(self, grad: GradientEstimator) -> None:
        """Raise ValueError where a rule changes what `grad` does not have, or has an impossible value at its ends."""
        for name in ("k", "lam"):
            rule = getattr(self, name)
            if rule is not None and not hasattr(grad, name):
                raise ValueError(f"course.{name} needs an estimator with {name}, {type(grad).__name__} has none")
        for end in (self.lam.first, self.lam.last) if isinstance(self.lam, Ramp) else ():
            check_lam(end)
        if isinstance(self.k, Ramp) and min(self.k.first, self.k.last) < 1:
            raise ValueError(f"course.k={self.k!r} must stay >= 1")

    def at(
        self, solver: Solver, grad: GradientEstimator, *, step: int, total: int, seed: int
    ) -> tuple[Solver, GradientEstimator]:
        """Return the solver and the estimator of `step`."""
        changes: dict[str, Any] = {}
        if self.k is not None:
            changes["k"] = int(self.k.at(step, total, seed))
        if self.lam is not None:
            changes["lam"] = float(self.lam.at(step, total, seed))
        if changes:
            grad = replace(cast(Any, grad), **changes)  # a dataclass with these fields, as was checked
        if self.depth is None:
            return solver, grad
        depth = max(1, int(self.depth.at(step, total, seed)))
        if isinstance(grad, BPTT):
            return solver, replace(grad, num_steps=depth)
        if isinstance(grad, UPG):
            grad = replace(grad, k=min(grad.k, depth))
        return replace(solver, max_steps=depth - (grad.k if isinstance(grad, UPG) else 1)), grad
