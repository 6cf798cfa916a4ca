"""Sums of what solves report, kept on the device until a log row is due."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from phantom import Solution, Stats
from phantom.engine.machine import distributed
from phantom.report import act_where_nobody_did


class SolveMeter:
    """Accumulate the statistics of solves; B problems per solve, several solves per batch for stacked implicit layers.

    Read it after backward, when the vjps are known.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = defaultdict(int)
        self._sums: list[dict[str, Tensor]] = []
        self._extra: dict[str, Tensor | float] = defaultdict(float)
        self._last: list[Stats] = []

    def add(self, solutions: Sequence[Solution]) -> None:
        """Add the solves of one batch."""
        self._counts["batches"] += 1
        self._last = [solution.stats for solution in solutions]
        for i, solution in enumerate(solutions):
            stats = solution.stats
            self._counts["num_evals"] += stats.num_evals
            self._counts["num_vjps"] += stats.num_vjps
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
                self._add_extra("adjoint_residual", stats.adjoint.residual.double().sum(), len(stats.residual))
            if solution.penalty is not None:
                self._add_extra("penalty", len(stats.residual) * solution.penalty.double(), len(stats.residual))

    def _add_extra(self, name: str, value: Tensor, problems: int) -> None:
        self._extra[name] = self._extra[name] + value
        self._counts[name] += problems

    def state(self) -> dict[str, Any]:
        """Return the sums so far, for a checkpoint."""
        return {"counts": dict(self._counts), "sums": self._sums, "extra": dict(self._extra)}

    def load(self, state: dict[str, Any]) -> None:
        """Add to the sums in `state`, in the place of those so far."""
        self._counts, self._extra = defaultdict(int, state["counts"]), defaultdict(float, state["extra"])
        self._sums = state["sums"]

    def report(self) -> dict[str, float]:
        """Return means per batch (num_evals, num_vjps) and per problem (the rest) over all ranks, which must all call.

        Synchronises with the device. With several solves per batch the per-problem numbers are also given per solve,
        as `residual/0`, `residual/1`.

        Where a solve did not wait for the device, a failure is noticed here: those of the last batch are acted upon as
        their `on_failure` says.

        Raises:
            SolveError: one of them has failed, with `on_failure="raise"`.
        """
        own = [self._counts, *({name: float(v) for name, v in sums.items()} for sums in (self._extra, *self._sums))]
        # a rank without a batch has no solves
        counts, extra, *rows = (_total(parts) for parts in zip_longest(*distributed.gather(own), fillvalue={}))
        if not counts:
            return {}
        for stats in self._last:
            act_where_nobody_did(stats)
        result = {name: counts[name] / counts["batches"] for name in ("num_evals", "num_vjps") if name in counts}
        result |= {name: value / counts[name] for name, value in extra.items()}
        for name in ("residual", "num_steps", "converged", "diverged"):
            if rows:
                result[name] = sum(row[name] for row in rows) / sum(row["problems"] for row in rows)
            if len(rows) > 1:
                result |= {f"{name}/{i}": row[name] / row["problems"] for i, row in enumerate(rows)}
        return result


def _total(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}
