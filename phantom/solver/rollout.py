"""The rollout: a fixed number of steps, and the last iterate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phantom.solution import Stats
from phantom.solver.base import Solver
from phantom.state import FlatMap
from phantom.validate import check_lam


@dataclass(frozen=True, kw_only=True)
class Rollout(Solver):
    """Apply z <- lam f(z) + (1 - lam) z exactly `max_steps` times and return the last iterate.

    For models whose recursion is the computation, converged or not (HRM, TRM, looped transformers): every other solver
    returns the iterate with the smallest residual. Cost: `max_steps` evaluations of f. The residual stays unknown
    (NaN), for it would cost one more; measure it with `FixedPoint`.
    """

    tol: None = None
    lam: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lam(self.lam)
        if self.tol is not None:
            raise ValueError(
                f"tol={self.tol!r} must be None (null in YAML): a rollout measures no residual; FixedPoint stops early"
            )

    def roll_out(
        self, f: FlatMap, z: Tensor, watch: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Tensor, Stats]:
        """Return the last iterate (B, D) from `z` (B, D), and what it cost; `watch` sees every step."""
        stats = Stats.of_no_solve(z)
        for step in range(1, self.max_steps + 1):
            fz = f(z)
            z = fz if self.lam == 1 else torch.lerp(z, fz, self.lam)
            if watch is not None:
                watch(step, z)
        stats.num_steps += self.max_steps
        stats.num_evals += self.max_steps
        return z, stats

    def start(self, z: Tensor, g: Tensor) -> None:
        return None

    def propose(self, memory: None, z: Tensor, g: Tensor) -> Tensor:
        return torch.add(z, g, alpha=self.lam)
