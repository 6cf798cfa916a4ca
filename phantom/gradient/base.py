"""A gradient estimator attaches a graph to a solved equilibrium."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from phantom.solution import Solution
from phantom.state import FlatMap


class GradientEstimator(ABC):
    """Estimate dL/dtheta and dL/dx through z_star = f(z_star; theta, x).

    Estimators act whenever grad is enabled, in training and evaluation mode alike.
    """

    needs_equilibrium: ClassVar[bool] = True
    needs_history: ClassVar[bool] = False
    unrolls: ClassVar[bool] = False  # whether `attach` adds its steps to `solution.unrolled`, where that is a list

    @abstractmethod
    def attach(self, f: FlatMap, solution: Solution) -> Tensor:
        """Return a (B, D) tensor with the value of the equilibrium, whose backward is the estimate.

        Args:
            f: the closed map of the solve on (B, D) tensors, with a graph to its parameters and input.
            solution: the solve in (B, D) form; evaluations of f and vjps are added to its `stats`.
        """


def check_grad_enabled() -> None:
    """Raise where an estimator is asked for a graph that cannot exist."""
    if not torch.is_grad_enabled():
        raise RuntimeError("attach needs grad: call it outside torch.no_grad(), or use solution.z_star")
