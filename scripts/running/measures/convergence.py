"""Theorem 2, Geng et al. 2021: UPG and NPG tend to the exact Jacobian, at the geometric rate of B = lam J + (1-lam) I.

One tanh layer f(z) = tanh(W z + U x + b); the Jacobian is that of h* to the input x. The batch holds the same problem
D times, so that one backward with the identity as cotangent gives all rows of the Jacobian.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.synthetic import SyntheticMap
from phantom import NPG, UPG, Broyden, FixedPoint, GradientEstimator, Implicit, fixed_point
from phantom.diagnostics import conditioning, dense_jacobian, neumann_matrix
from scripts.running.measures.claims import claim, significant

ESTIMATORS = {"NPG": NPG, "UPG": UPG}
NO_SOLVE = FixedPoint(max_steps=0, tol=None)
TIGHT = Broyden(max_steps=80, tol=1e-15)
DTYPE = torch.float64
# the window of relative errors in which a rate is read: the beginning is transient, the end is rounding
WINDOW = (1e-11, 1e-4)


def measure(
    *, seeds: Sequence[int], dim: int, spectral_norm: float, lams: Sequence[float], ks: Sequence[int], start_steps: int
) -> dict[str, Any]:
    """Return `rows` of relative errors by estimator, start and lam, `conditioning` and `damped` of B, and `claims`.

    Args:
        lams: damping, in increasing order.
        ks: in increasing order.
        start_steps: plain iterations before an estimator begins at the start `inexact`.
    """
    rows, damped = [], []
    conditions: dict[float, list[list[float]]] = {lam: [] for lam in lams}
    limits = []
    for seed in seeds:
        layer = Layer(seed, dim, spectral_norm)
        limits.append(float(conditioning(torch.linalg.inv(torch.eye(dim, dtype=DTYPE) - layer.jacobian))))
        for lam in lams:
            b = layer.damped(lam)
            damped.append(
                {
                    "seed": seed,
                    "lam": lam,
                    "norm": significant(torch.linalg.matrix_norm(b, ord=2)),
                    "radius": significant(torch.linalg.eigvals(b).abs().max()),
                }
            )
            conditions[lam].append([float(conditioning(neumann_matrix(layer.jacobian, k=k, lam=lam))) for k in ks])
            for start, point in (("exact", layer.z_star), ("inexact", layer.iterate(start_steps))):
                for name, estimator in ESTIMATORS.items():
                    errors = [layer.error(point, estimator(k=k, lam=lam)) for k in ks]
                    row = {"estimator": name, "start": start, "lam": lam, "seed": seed}
                    row["error"] = [significant(error, 4) for error in errors]
                    if start == "exact":
                        row["rate"] = significant(rate(ks, errors))
                        row["over_bound"] = significant(layer.over_bound(lam, ks, errors))
                    rows.append(row)
    return {
        "rows": rows,
        "damped": damped,
        "conditioning": [
            {"lam": lam, "mean": [significant(v, 4) for v in torch.tensor(found).mean(dim=0)]}
            for lam, found in conditions.items()
        ],
        "conditioning_limit": significant(sum(limits) / len(limits), 4),
        "claims": [*claims(rows, damped, lams, ks), counterexample(dim, spectral_norm, lams)],
    }


class Layer:
    """D copies of one problem: its equilibrium, its dense Jacobian J, and the exact dh*/dx."""

    def __init__(self, seed: int, dim: int, spectral_norm: float, weight: Tensor | None = None) -> None:
        torch.manual_seed(seed)
        self.map = SyntheticMap(dim=dim, spectral_norm=spectral_norm, activation="tanh").to(DTYPE)
        if weight is not None:
            self.map.weight.data.copy_(weight)
        self.x = torch.randn(1, dim, dtype=DTYPE).repeat(dim, 1).requires_grad_()
        self.zeros = torch.zeros(dim, dim, dtype=DTYPE)
        f = self.map.bind(self.x)
        self.z_star = fixed_point(f, self.zeros, solver=TIGHT, grad=Implicit(solver=TIGHT)).z_star
        self.jacobian = dense_jacobian(f, self.z_star)[0].detach()
        slope = 1 - self.z_star[0] ** 2
        eye = torch.eye(dim, dtype=DTYPE)
        self.exact = torch.linalg.solve(eye - self.jacobian, slope[:, None] * self.map.input_weight.detach())
        self.size = torch.linalg.matrix_norm(self.exact, ord=2)

    def damped(self, lam: float) -> Tensor:
        """Return B = lam J + (1 - lam) I."""
        return lam * self.jacobian + (1 - lam) * torch.eye(len(self.jacobian), dtype=DTYPE)

    def iterate(self, steps: int) -> Tensor:
        """Return the state after plain iterations from zero, as many as given."""
        with torch.no_grad():
            z = self.zeros
            for _ in range(steps):
                z = self.map.bind(self.x)(z)
            return z

    def error(self, start: Tensor, grad: GradientEstimator) -> float:
        """Return |A - dh*/dx| / |dh*/dx| in the spectral norm, for the estimator's A from `start`."""
        value = fixed_point(self.map.bind(self.x), start, solver=NO_SOLVE, grad=grad).value
        (a,) = torch.autograd.grad(value, self.x, torch.eye(len(self.zeros), dtype=DTYPE))
        return float(torch.linalg.matrix_norm(a - self.exact, ord=2) / self.size)

    def over_bound(self, lam: float, ks: Sequence[int], errors: Sequence[float]) -> float:
        """Return the largest error over |B^k|; errors that are rounding are left out."""
        powers = [torch.linalg.matrix_norm(torch.linalg.matrix_power(self.damped(lam), k), ord=2) for k in ks]
        return max(error / float(power) for error, power in zip(errors, powers, strict=True) if error > WINDOW[0])


def rate(ks: Sequence[int], errors: Sequence[float]) -> float:
    """Return the factor by which the error falls per term: least squares on its logarithm, NaN without two points."""
    points = [(k, math.log(error)) for k, error in zip(ks, errors, strict=True) if WINDOW[0] < error < WINDOW[1]]
    if len(points) < 2:
        return math.nan
    k, y = torch.tensor(points, dtype=DTYPE).T
    k = k - k.mean()
    return math.exp(float(k @ y / (k @ k)))


def claims(
    rows: Sequence[dict[str, Any]], damped: Sequence[dict[str, Any]], lams: Sequence[float], ks: Sequence[int]
) -> list[dict[str, Any]]:
    """Return Theorem 2 and the statements around it, with their numbers."""

    def last(estimator: str, start: str) -> list[float]:
        return [row["error"][-1] for row in rows if (row["estimator"], row["start"]) == (estimator, start)]

    radius = {(d["seed"], d["lam"]): d["radius"] for d in damped}
    norm = {(d["seed"], d["lam"]): d["norm"] for d in damped}
    exact = [row for row in rows if row["start"] == "exact"]
    off = [abs(row["rate"] / radius[row["seed"], row["lam"]] - 1) for row in exact]
    pairs = [((seed, low), (seed, high)) for seed, high in norm for low in lams if low < high]
    average = {lam: statistics.fmean(value for (_, other), value in radius.items() if other == lam) for lam in lams}
    k = ks[-1]
    return [
        claim(
            f"(i) the Neumann series converges: the largest relative error at k={k}",
            max(last("NPG", "exact")),
            "<",
            1e-6,
        ),
        claim(
            f"(ii) the damped unrolling converges from an inexact start, too: the largest error at k={k}",
            max(last("UPG", "inexact")),
            "<",
            1e-6,
        ),
        claim(
            f"from an inexact start NPG keeps a bias, UPG does not: the least error of NPG at k={k}",
            min(last("NPG", "inexact")),
            ">",
            1e-3,
        ),
        claim(
            "the error is at most |B^k| |dh*/dx|: the largest ratio", max(r["over_bound"] for r in exact), "<=", 1.001
        ),
        claim("the rate is the spectral radius of B: the largest relative difference", max(off), "<", 0.1),
        claim(
            "a small lam slows convergence: the least rise of the mean radius of B to the next smaller lam",
            min(average[low] - average[high] for low, high in itertools.pairwise(lams)),
            ">",
            0,
        ),
        claim(
            "the same on every one of these layers: the least rise of the radius",
            min(radius[low] - radius[high] for low, high in pairs),
            ">",
            0,
        ),
        claim(
            "|B| increases as lam decreases (the paper's reason): the least rise on these layers",
            min(norm[low] - norm[high] for low, high in pairs),
            ">",
            0,
        ),
    ]


def counterexample(dim: int, spectral_norm: float, lams: Sequence[float]) -> dict[str, Any]:
    """Return the claim that damping slows convergence, for a layer whose W is symmetric with negative eigenvalues."""
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=DTYPE))
    weight = -q @ torch.diag(torch.linspace(0.1, 1, dim, dtype=DTYPE) * spectral_norm) @ q.T
    layer = Layer(0, dim, spectral_norm, weight)
    radii = [float(torch.linalg.eigvals(layer.damped(lam)).abs().max()) for lam in lams]
    growth = min(low - high for low, high in itertools.pairwise(radii))
    return claim(
        "a small lam slows convergence where W is symmetric with negative eigenvalues: the least rise of the radius",
        growth,
        ">",
        0,
    )
