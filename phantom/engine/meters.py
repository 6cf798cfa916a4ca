"""Sums of what solves report, kept on the device until a log row is due."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phantom import Solution


class SolveMeter:
    """Accumulate the statistics of solves; B problems per solve, several solves per batch for stacked implicit layers.

    Read it after backward, when the vjps are known.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._evals = 0
        self._vjps = 0
        self._sums: list[dict[str, Tensor]] = []
        self._adjoint: Tensor | float = 0.0
        self._adjoint_problems = 0

    def add(self, solutions: Sequence[Solution]) -> None:
        """Add the solves of one batch."""
        self._batches += 1
        for i, solution in enumerate(solutions):
            stats = solution.stats
            self._evals += stats.num_evals
            self._vjps += stats.num_vjps
            sums = {
                "problems": torch.ones_like(stats.residual).sum(),
                "residual": stats.residual.double().sum(),
                "num_steps": stats.num_steps.sum(),
                "converged": stats.converged.sum(),
                "diverged": stats.diverged.sum(),
            }
            if i == len(self._sums):
                self._sums.append(sums)
            else:
                self._sums[i] = {name: value + self._sums[i][name] for name, value in sums.items()}
            if stats.adjoint is not None:
                self._adjoint = self._adjoint + stats.adjoint.residual.double().sum()
                self._adjoint_problems += len(stats.adjoint.residual)

    def report(self) -> dict[str, float]:
        """Return means per batch (num_evals, num_vjps) and per problem (the rest); synchronises with the device.

        With several solves per batch the per-problem numbers are also given per solve, as `residual/0`, `residual/1`.
        """
        if not self._batches:
            return {}
        rows = [{name: float(value) for name, value in sums.items()} for sums in self._sums]
        result = {"num_evals": self._evals / self._batches, "num_vjps": self._vjps / self._batches}
        if self._adjoint_problems:
            result["adjoint_residual"] = float(self._adjoint) / self._adjoint_problems
        for name in ("residual", "num_steps", "converged", "diverged"):
            if rows:
                result[name] = sum(row[name] for row in rows) / sum(row["problems"] for row in rows)
            if len(rows) > 1:
                result |= {f"{name}/{i}": row[name] / row["problems"] for i, row in enumerate(rows)}
        return result
