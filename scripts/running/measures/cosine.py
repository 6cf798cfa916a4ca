"""Figure 1, Geng et al. 2021: the cosine of NPG and UPG to the exact gradient of random contractions.

The map is one layer, f(z) = act(W z + U x + b) with |W|_2 = 0.9, solved by the plain iteration. The exact gradient is
that of backpropagation through the iterations; implicit differentiation with a fixed number of Broyden steps is
computed beside it. The loss is <g, z> with a random g, so that all estimators see the same cotangent; the gradient is
that of W, U and b, summed over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.synthetic import Activation, SyntheticMap
from phantom import BPTT, NPG, UPG, Broyden, FixedPoint, GradientEstimator, Implicit, Solution, Solver, fixed_point
from phantom.diagnostics import cosine
from scripts.running.measures.claims import claim, significant

ESTIMATORS = {"NPG": NPG, "UPG": UPG}
NO_SOLVE = FixedPoint(max_steps=0, tol=None)
# a cosine near one is known to about the residual of the equilibrium
ROUNDING = 1e-6


def measure(
    *,
    seeds: Sequence[int],
    activations: Sequence[Activation],
    dim: int,
    batch: int,
    spectral_norm: float,
    lams: Sequence[float],
    max_k: int,
    max_steps: int,
    tol: float,
    implicit_steps: int,
) -> dict[str, Any]:
    """Return `rows`, a curve of cosines for k = 1 ... max_k each, `checks` of the exact gradient, and `claims`.

    Args:
        dim: width of the layer.
        batch: problems that share the layer.
        lams: damping, in increasing order.
        max_steps, tol: of the plain iteration; its steps are those of the backpropagation, too.
        implicit_steps: of Broyden's method for the adjoint equation.
    """
    curves: dict[tuple[str, str, float], list[list[float]]] = {}
    checks = []
    for activation in activations:
        for seed in seeds:
            torch.manual_seed(seed)
            layer = SyntheticMap(dim=dim, spectral_norm=spectral_norm, activation=activation).double()
            x, g = torch.randn(2, batch, dim, dtype=torch.float64)
            problem = Problem(layer, x, g)
            solver = FixedPoint(max_steps=max_steps, tol=tol)
            implicit = Implicit(solver=Broyden(max_steps=implicit_steps, tol=None))
            start = torch.zeros_like(x)
            solution, other = problem.gradient(start, solver, implicit)
            exact = problem.gradient(start, solver, BPTT(num_steps=max_steps))[1]
            checks.append(
                {
                    "activation": activation,
                    "seed": seed,
                    "steps": int(solution.stats.num_steps.max()),
                    "residual": significant(solution.stats.residual.max()),
                    "cosine": significant(cosine(other, exact), 9),
                }
            )
            for name, estimator in ESTIMATORS.items():
                for lam in lams:
                    values = [
                        float(cosine(problem.gradient(solution.z_star, NO_SOLVE, estimator(k=k, lam=lam))[1], exact))
                        for k in range(1, max_k + 1)
                    ]
                    curves.setdefault((activation, name, lam), []).append(values)
    rows = [
        {"activation": activation, "estimator": name, "lam": lam, "seed": seed, "cosine": [significant(v) for v in one]}
        for (activation, name, lam), found in curves.items()
        for seed, one in zip(seeds, found, strict=True)
    ]
    return {"rows": rows, "checks": checks, "claims": claims(curves, checks, lams, tol)}


class Problem:
    """A layer, its inputs (B, D) and the cotangent of its equilibrium (B, D)."""

    def __init__(self, layer: SyntheticMap, x: Tensor, g: Tensor) -> None:
        self.layer, self.x, self.g = layer, x, g

    def gradient(self, z0: Tensor, solver: Solver, grad: GradientEstimator) -> tuple[Solution, Sequence[Tensor]]:
        """Return the solution from `z0`, and the estimate of the gradient to the layer's parameters."""
        solution = fixed_point(self.layer.bind(self.x), z0, solver=solver, grad=grad)
        return solution, torch.autograd.grad(solution.value, list(self.layer.parameters()), self.g)


def claims(
    curves: dict[tuple[str, str, float], list[list[float]]],
    checks: Sequence[dict[str, Any]],
    lams: Sequence[float],
    tol: float,
) -> list[dict[str, Any]]:
    """Return the statements of Section 3 about the synthetic setting, with their numbers."""
    values = {key: torch.tensor(found, dtype=torch.float64) for key, found in curves.items()}
    means = {key: found.mean(dim=0) for key, found in values.items()}
    falls = torch.stack([(mean[:-1] - mean[1:]).max() for mean in means.values()])
    pairs = [((a, n, lam), (a, n, more)) for a, n, lam in means for more in lams if more > lam]
    ahead = torch.stack([(means[low] - means[high]).max() for low, high in pairs])
    apart = [(values[a, "NPG", lam] - values[a, "UPG", lam]).abs().max() for a, _, lam in curves]
    least = min(found.min() for found in values.values())
    return [
        claim(
            "the iteration ends at a small relative residual: the largest", max(c["residual"] for c in checks), "<", tol
        ),
        claim(
            "backpropagation and implicit differentiation agree: the least cosine",
            min(c["cosine"] for c in checks),
            ">",
            0.9999,
        ),
        claim("the mean cosine rises with k: its largest fall from k to k + 1", falls.max(), "<=", ROUNDING),
        claim("a small lam is slower: the most by which the mean of a smaller lam leads", ahead.max(), "<=", ROUNDING),
        claim("the estimate is an ascent direction: the least cosine", least, ">", 0),
        claim(
            "at an exact equilibrium UPG and NPG are the same: the largest difference of cosines",
            max(apart),
            "<=",
            100 * tol,
        ),
    ]
