"""The damped fixed-point (Picard) iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phantom.solver.base import Solver
from phantom.validate import check_lam


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Solver):
    """Iterate z <- lam f(z) + (1 - lam) z; lam = 1 is the plain iteration.

    Cost: one evaluation of f a step, no memory. It converges where the spectral radius of
    B = lam J + (1 - lam) I is below one; not the choice for a stiff or expansive f.
    """

    lam: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lam(self.lam)

    def start(self, z: Tensor, g: Tensor) -> None:
        return None

    def propose(self, memory: None, z: Tensor, g: Tensor) -> Tensor:
        return torch.add(z, g, alpha=self.lam, out=g)
