"""The estimator that asks nothing of f in backward: the inverse that the forward solve has built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from phantom.gradient.adjoint import AdjointEstimator, Vjp
from phantom.solution import Solution, Stats
from phantom.solver.ring import Steps
from phantom.state import FlatMap


@dataclass(frozen=True, kw_only=True)
class SHINE(AdjointEstimator):
    """Share the inverse estimate of the forward solve: u = H^T g with Broyden's H, which stands for (I - J)^{-1}.

    H is made to serve the residuals of the forward solve; the cotangent points elsewhere, and there H is still close to
    its initial value, the identity. Expect a little more than the one-step gradient, at the same cost: no vjp, and
    two passes over the stored steps, which are kept until backward. NPG with a few terms is the better estimate, and
    the steadier one: H depends on the path of the solve, down to its rounding.

    Source: Ramzi et al., *SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and
    implicit models* (2022).
    """

    needs_history: ClassVar[bool] = True

    def attach(self, f: FlatMap, solution: Solution) -> Tensor:
        if not isinstance(solution.history, Steps):
            raise TypeError(
                "SHINE reuses the steps of Broyden, and the solve left none: use it with solver=Broyden(...), on "
                "problems that do not depend on each other"
            )
        return super().attach(f, solution)

    def cotangent(self, vjp: Vjp, g: Tensor, stats: Stats, history: Any) -> Tensor:
        # under torch.func g may hold several cotangents of the problems, one set after the other
        parts = g.split(history.steps.shape[1])
        return torch.cat([history.apply_inverse_transposed(part) for part in parts])
