"""Theorem 1, Geng et al. 2021: where the condition (6) holds, the phantom gradient is an ascent direction.

    |A (I - dF/dh) - dF/dtheta| < sigma_min^2 / sigma_max    implies    <A dL/dh, dL/dtheta> > 0 for every dL/dh != 0,

with the extreme singular values of dF/dtheta. Everything is dense: `ratio` is the left side over the right one, and
`least` is the smallest <phantom, exact> / |exact|^2 over all dL/dh, an eigenvalue.

Three families: `matrix`, a random J and dF/dtheta of a chosen spread, with A by the Neumann series; and NPG and UPG
on one tanh layer, from an equilibrium that a few steps have only begun to solve.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.synthetic import SyntheticMap
from phantom import NPG, UPG, Broyden, FixedPoint, GradientEstimator, Implicit, fixed_point
from phantom.diagnostics import ascent_margin, dense_jacobian, neumann_matrix
from scripts.running.measures.claims import claim, significant

ESTIMATORS = {"NPG": NPG, "UPG": UPG}
DTYPE = torch.float64


def measure(
    *,
    seeds: Sequence[int],
    dim: int,
    lams: Sequence[float],
    matrix_ks: Sequence[int],
    layer_ks: Sequence[int],
    spectral_norms: Sequence[float],
    start_steps: int,
) -> dict[str, Any]:
    """Return `rows` of cases by family, k and lam, the `counts` of both sides of the condition, and `claims`.

    Args:
        dim: of the state.
        matrix_ks: terms of the Neumann series of the family `matrix`.
        layer_ks: steps of NPG and UPG on the layers.
        spectral_norms: of the layers; the matrices have one between 0.1 and 0.9.
        start_steps: plain iterations before NPG and UPG begin.
    """
    cases: dict[tuple[str, int, float], list[dict[str, float]]] = defaultdict(list)
    for seed in seeds:
        jacobian, theta = random_problem(seed, dim)
        for k in matrix_ks:
            for lam in lams:
                d = neumann_matrix(jacobian, k=k, lam=lam)
                found = case(d @ theta, jacobian, theta)
                found["remark"] = float(remark_margin(d, jacobian, theta))
                cases["matrix", k, lam].append(found)
        for spectral_norm in spectral_norms:
            layer = Layer(seed, dim, spectral_norm, start_steps)
            for name, estimator in ESTIMATORS.items():
                for k in layer_ks:
                    for lam in lams:
                        a = layer.phantom_jacobian(estimator(k=k, lam=lam))
                        cases[name, k, lam].append(case(a, layer.jacobian, layer.theta_jacobian))
    rows = [
        {
            "family": family,
            "k": k,
            "lam": lam,
            "ratio": [significant(c["ratio"], 4) for c in found],
            "least": [significant(c["least"], 4) for c in found],
        }
        for (family, k, lam), found in cases.items()
    ]
    every = [c for found in cases.values() for c in found]
    outside = [c for c in every if c["ratio"] >= 1]
    counts = {
        "cases": len(every),
        "condition holds": len(every) - len(outside),
        "condition fails, every direction ascends": sum(c["least"] > 0 for c in outside),
        "condition fails, some direction does not": sum(c["least"] <= 0 for c in outside),
    }
    return {"rows": rows, "counts": counts, "claims": claims(cases, max(matrix_ks))}


def random_problem(seed: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return J (D, D) with |J|_2 in (0.1, 0.9), and dF/dtheta (D, P), P >= D, of condition 1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dim + seed % 3
    jacobian = torch.randn(dim, dim, generator=generator, dtype=DTYPE)
    jacobian *= (0.1 + 0.8 * torch.rand((), generator=generator, dtype=DTYPE)) / torch.linalg.matrix_norm(jacobian, 2)
    u, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=DTYPE))
    v, _ = torch.linalg.qr(torch.randn(parameters, parameters, generator=generator, dtype=DTYPE))
    return jacobian, u @ torch.diag(torch.linspace(1, 1 + 3 * (seed % 4), dim, dtype=DTYPE)) @ v[:dim]


class Layer:
    """One problem of a random tanh layer: its dense Jacobians at the equilibrium, and phantom ones from a coarse start.

    Args:
        start_steps: plain iterations before an estimator begins.
    """

    def __init__(self, seed: int, dim: int, spectral_norm: float, start_steps: int) -> None:
        torch.manual_seed(seed)
        self.map = SyntheticMap(dim=dim, spectral_norm=spectral_norm, activation="tanh").to(DTYPE)
        self.x, self.zeros = torch.randn(1, dim, dtype=DTYPE), torch.zeros(1, dim, dtype=DTYPE)
        self.start = FixedPoint(max_steps=start_steps, tol=None)
        tight = Broyden(max_steps=60, tol=1e-14)
        z_star = fixed_point(self.map.bind(self.x), self.zeros, solver=tight, grad=Implicit(solver=tight)).z_star
        self.jacobian = dense_jacobian(self.map.bind(self.x), z_star)[0]
        self.theta_jacobian = self._rows(self.map.bind(self.x)(z_star))

    def phantom_jacobian(self, grad: GradientEstimator) -> Tensor:
        """Return A (D, P), the estimate of dh*/dtheta: one backward per row."""
        return self._rows(fixed_point(self.map.bind(self.x), self.zeros, solver=self.start, grad=grad).value)

    def _rows(self, value: Tensor) -> Tensor:
        parameters = list(self.map.parameters())
        units = torch.eye(value.shape[1], dtype=DTYPE)
        found = [torch.autograd.grad(value, parameters, unit[None], retain_graph=True) for unit in units]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in found])


def case(a: Tensor, jacobian: Tensor, theta: Tensor) -> dict[str, float]:
    """Return `ratio`, `least`, and the left side of Eq. (18) over its right side, for A (D, P) of full row rank."""
    eye = torch.eye(len(jacobian), dtype=DTYPE)
    exact = torch.linalg.solve(eye - jacobian, theta)
    singular = torch.linalg.svdvals(theta)
    bound = singular[len(jacobian) - 1] ** 2 / singular[0]
    error = bound - ascent_margin(a, jacobian, theta)
    distance = torch.linalg.matrix_norm(a - exact, ord=2)
    lipschitz = torch.linalg.matrix_norm(jacobian, ord=2)
    # below rounding both sides of Eq. (18) are noise
    known = distance > 1e-12 * torch.linalg.matrix_norm(exact, ord=2)
    return {
        "ratio": float(error / bound),
        "least": float(least_inner_product(a, exact)),
        "eq18": float(error / ((1 + lipschitz) * distance)) if known else 0.0,
    }


def least_inner_product(a: Tensor, exact: Tensor) -> Tensor:
    """Return the minimum over g of <a^T g, e^T g> / |e^T g|^2, for `a` and `exact` (D, P) of full row rank."""
    factor = torch.linalg.cholesky(exact @ exact.T)
    half = torch.linalg.solve_triangular(factor, a @ exact.T + exact @ a.T, upper=False) / 2
    return torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False))[0]


def remark_margin(d: Tensor, jacobian: Tensor, theta: Tensor) -> Tensor:
    """Return |(I - J) D - I| kappa^2, below one where Eq. (8) holds."""
    eye = torch.eye(len(jacobian), dtype=DTYPE)
    return torch.linalg.matrix_norm((eye - jacobian) @ d - eye, ord=2) * torch.linalg.cond(theta) ** 2


def claims(cases: dict[tuple[str, int, float], list[dict[str, float]]], last: int) -> list[dict[str, Any]]:
    """Return Theorem 1 and the statements around it, with their numbers."""
    every = [c for found in cases.values() for c in found]
    inside = [c["least"] for c in every if c["ratio"] < 1]
    remark = [c["ratio"] for c in every if c.get("remark", 2.0) < 1]
    final = [c["ratio"] for (family, k, _), found in cases.items() if family == "matrix" and k == last for c in found]
    return [
        claim(
            f"Theorem 1: in the {len(inside)} cases where (6) holds, the least <phantom, exact> / |exact|^2",
            min(inside, default=float("nan")),
            ">",
            0,
        ),
        claim(
            f"Remark 1: in the {len(remark)} cases where (8) holds, (6) does: the largest left side over right side",
            max(remark, default=float("nan")),
            "<",
            1,
        ),
        claim("Eq. (18): the largest left side over right side", max(c["eq18"] for c in every), "<=", 1 + 1e-9),
        claim(f"(6) holds if k is large enough: the largest left side over right side at k={last}", max(final), "<", 1),
    ]
