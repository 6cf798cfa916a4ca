"""The estimators under test, and a map whose equilibrium, Jacobian and exact gradients dense algebra gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phantom import BPTT, NPG, UPG, Anderson, Broyden, Implicit, fixed_point
from tests.phantom.problems import DTYPE, TanhMap, randn

SOLVE = Broyden(max_steps=80, tol=1e-14)  # as near an exact equilibrium as float64 has
DIM, BATCH = 6, 4

ESTIMATORS = {
    "upg": UPG(k=5, lam=0.5),
    "upg_checkpoint": UPG(k=5, lam=0.5, checkpoint=True),
    "npg": NPG(k=5, lam=0.5),
    "one_step": NPG(k=1, lam=1.0),
    "implicit": Implicit(solver=Broyden(max_steps=60, tol=1e-14)),
    "implicit_anderson": Implicit(solver=Anderson(max_steps=80, tol=1e-13)),
    "bptt": BPTT(num_steps=6),
    "bptt_damped_checkpoint": BPTT(num_steps=6, lam=0.7, checkpoint=True),
}
ADJOINT = ("npg", "one_step", "implicit", "implicit_anderson")


def each(*names: str):
    chosen = {name: ESTIMATORS[name] for name in names or ESTIMATORS}
    return pytest.mark.parametrize("grad", chosen.values(), ids=chosen)


class Case:
    """The map f(z) = tanh(W z + b) + x, its equilibrium, and everything about it that dense algebra gives."""

    def __init__(self, *, radius: float = 0.8, seed: int = 0) -> None:
        self.map = TanhMap(DIM, radius=radius, seed=seed)
        self.x = randn(BATCH, DIM, seed=seed + 10).requires_grad_()
        self.cotangent = randn(BATCH, DIM, seed=seed + 11)
        with torch.no_grad():
            z = torch.zeros(BATCH, DIM, dtype=DTYPE)
            for _ in range(300):
                z = self.map.bind(self.x)(z)
            self.z_star = z
            slope = 1 - torch.tanh(z @ self.map.weight.T + self.map.bias) ** 2
            self.jacobian = slope[:, :, None] * self.map.weight
            self.slope = slope

    @property
    def leaves(self) -> list[Tensor]:
        return [self.map.weight, self.map.bias, self.x]

    def solve(self, grad, *, solver=SOLVE, z0: Tensor | None = None):
        z0 = self.z_star if z0 is None else z0
        return fixed_point(self.map.bind(self.x), z0, solver=solver, grad=grad)

    def gradients(self, grad, **kwargs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.solve(grad, **kwargs).value, self.leaves, self.cotangent)

    def carry(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return u^T df/d(weight, bias, x) by hand."""
        inner = u * self.slope
        return inner.T @ self.z_star, inner.sum(0), u

    def exact_adjoint(self) -> Tensor:
        eye = torch.eye(DIM, dtype=DTYPE)
        return torch.linalg.solve(eye - self.jacobian.mT, self.cotangent[:, :, None])[:, :, 0]


def close(actual, expected, tol: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tol, atol=tol)
