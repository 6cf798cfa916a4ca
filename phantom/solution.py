"""What a solve returns: the value, where it came from, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from phantom.state import State

S = TypeVar("S", bound=State)


@dataclass
class Stats:
    """Statistics of one solve. B problems, T steps; those of one problem do not depend on its neighbours.

    Args:
        num_steps: (B,) steps a problem took before it stopped changing.
        num_evals: evaluations of f, those of the estimator's `attach` included.
        num_vjps: vector-Jacobian products of the estimator's backward so far (those of the ordinary backward through
            the attached graph are not counted).
        residual: (B,) residual of the returned iterate, in the solver's own measure: |f(z) - z| / max(|f(z)|, |f(z0)|)
            (`stop="relative"`), |f(z) - z| (`"absolute"`), or in the backward solve |J^T u + g - u| / |g|; of problems
            that were seen there to be one, relative to the root mean square of their |g|.
        converged: (B,) True where `residual <= tol`; False without a tolerance.
        diverged: (B,) True where |f(z) - z| left the finite range or grew beyond the limit of the loop.
        stalled: (B,) True where the solve stopped above `tol` because the residual had come down to the rounding of
            f(z), and fell no further.
        dependent: () True where the residual of a problem was seen to change with the state of others.
        trace: (T + 1, B) residual of every iterate visited, the initial guess first.
        scale: (B,) what the residual is relative to, or at least; None for an absolute one.
        confirmed: whether f was evaluated at the returned state as a whole: `residual` is then true of dependent
            problems, too.
        tol: the tolerance of the solver; None for a fixed budget.
        computed_in: the arithmetic of f where it is coarser than that of `residual`, as under autocast; else None.
        differentiated_in: the same of the evaluations with a graph, whose rounding bounds the backward solve.
        on_failure: the policy of `fixed_point`, which the backward solve follows.
        confirm: whether the backward solve may measure what it returns by one product more, as `fixed_point` says.
        group: name of the process group of `fixed_point`, whose ranks stop together in the backward solve, too.
        acted: whether the policy has been followed, which waits for the device.
        adjoint: statistics of the backward solve; None before backward and for estimators that do not solve.
        fallback: (B,) of a backward solve: True where it found nothing better than u = 0, whose residual is 1, and
            u = g was returned, the one-step gradient. `residual` is that before: 1, or more where problems depend on
            each other. None of a forward solve.
    """

    num_steps: Tensor
    num_evals: int
    residual: Tensor
    converged: Tensor
    diverged: Tensor
    stalled: Tensor
    dependent: Tensor
    trace: Tensor
    scale: Tensor | None = None
    confirmed: bool = True
    tol: float | None = None
    computed_in: torch.dtype | None = None
    differentiated_in: torch.dtype | None = None
    on_failure: Any = "useless"
    group: str | None = None
    confirm: bool = False
    acted: bool = False
    num_vjps: int = 0
    adjoint: Stats | None = None
    fallback: Tensor | None = None

    @classmethod
    def of_no_solve(cls, z: Tensor) -> Stats:
        """Return the statistics of a solve of zero steps from `z` (B, D): nothing evaluated, nothing known."""
        batch = z.shape[0]
        no = torch.zeros(batch, dtype=torch.bool, device=z.device)
        return cls(
            num_steps=torch.zeros(batch, dtype=torch.long, device=z.device),
            num_evals=0,
            residual=z.new_full((batch,), torch.nan),
            converged=no,
            diverged=no.clone(),
            stalled=no.clone(),
            dependent=no.new_zeros(()),
            trace=z.new_empty((0, batch)),
        )

    def follow(self, other: Stats) -> None:
        """Take over what the caller of the solve of `other` has set for its backward."""
        self.group, self.on_failure, self.confirm = other.group, other.on_failure, other.confirm
        self.differentiated_in = other.differentiated_in


@dataclass
class Solution(Generic[S]):
    """The outcome of `fixed_point`; an estimator gets it with every state as one (B, D) tensor.

    Args:
        value: the state to compute with. With grad enabled it carries the estimator's graph; without, it is `z_star`.
        z0: the initial guess.
        z_star: the detached iterate whose residual is reported: the best one visited, which is finite if `z0` is, or
            with `returns="last"` the last one; also the last one of `Rollout`, which measures nothing.
        stats: cost and quality of the solve.
        history: the solver's memory, kept only for an estimator that reuses it; None otherwise.
        states: the iterates that `fixed_point(states=...)` asks for, each with the estimator's graph as `value` has it.
        unrolled: the states after each of the steps that UPG or BPTT differentiates, with a graph, the last of which
            has the value of `value`; None unless `fixed_point(unrolled=True)` asks for them, and without grad.
        penalty: () the value of the DEQ's regulariser, with a graph; None without one.
    """

    value: S
    z0: S
    z_star: S
    stats: Stats
    history: Any = None
    states: tuple[S, ...] = ()
    unrolled: list[S] | None = None
    penalty: Tensor | None = None


for _record in (Stats, Solution):
    register_dataclass(_record)
