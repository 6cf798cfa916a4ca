"""The solvers under test, and a wrapper that records what a map was asked for."""

from __future__ import annotations

import pytest
from torch import Tensor

from phantom import Anderson, Broyden, FixedPoint, Solver

TOL = 1e-11  # of a solve that is to reach the exact solution

SOLVERS = {
    "plain": FixedPoint(max_steps=8000, tol=TOL),
    "damped": FixedPoint(max_steps=8000, tol=TOL, lam=0.6),
    "anderson": Anderson(max_steps=400, tol=TOL),
    "anderson_damped": Anderson(max_steps=600, tol=TOL, memory=3, lam=0.7),
    "broyden": Broyden(max_steps=100, tol=TOL),
    "broyden_ring": Broyden(max_steps=1000, tol=TOL, memory=5),
}
FEW_STEPS = {
    "plain": FixedPoint(max_steps=7, tol=None),
    "anderson": Anderson(max_steps=7, tol=None, memory=3),
    "broyden": Broyden(max_steps=7, tol=None),
    "broyden_ring": Broyden(max_steps=7, tol=None, memory=3),
}


def each(solvers: dict[str, Solver]):
    return pytest.mark.parametrize("solver", solvers.values(), ids=solvers)


class Recorded:
    """Wrap f and keep every state it was asked for."""

    def __init__(self, f) -> None:
        self.f, self.calls = f, []

    def __call__(self, z: Tensor) -> Tensor:
        self.calls.append(z.clone())
        return self.f(z)
