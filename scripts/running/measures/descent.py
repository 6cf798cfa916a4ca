"""Theorem 3, Geng et al. 2021: SGD by a phantom gradient with error at most eps ends near a stationary point.

    E[ sum_n eta_n |grad R|^2 / sum_n eta_n ] <= O(eps + log N / sqrt(N)),    eta_n = eta / sqrt(n)

The risk is R = mean_i |h*(x_i) - y_i|^2 / 2 over a finite set. The targets are equilibria of a teacher with noise,
which no parameters reach, so that the error of a phantom gradient does not vanish at the minimum. The layer is
h = tanh(W h + U x + b) with a fixed W, and U and b are trained: all assumptions of the theorem hold along the whole
path. W is symmetric and positive with a largest eigenvalue near one, which makes truncation costly. Equilibria are
found by Newton's method, and exact gradients by dense solves.

Shapes: S seeds, which run side by side, M examples, D the dimension of the state and of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from models.synthetic import SyntheticMap
from phantom import NPG, Broyden, FixedPoint, GradientEstimator, Implicit, fixed_point
from phantom.diagnostics import exact_adjoint
from scripts.running.measures.claims import claim, significant

NO_SOLVE = FixedPoint(max_steps=0, tol=None)
NEWTON_STEPS = 30
DTYPE = torch.float64
POINTS = 40  # kept of every curve, evenly over the logarithm of n
TAIL = 0.1  # the share of steps at the end whose mean is the radius


def measure(
    *,
    seeds: Sequence[int],
    dim: int,
    spectral_norm: float,
    examples: int,
    noise: float,
    batch: int,
    steps: int,
    eta: float,
    ks: Sequence[int],
    lam: float,
) -> dict[str, Any]:
    """Return `rows`, one a run: its curve of the weighted mean, its `eps`, its `radius`; `n` of the curves; `claims`.

    Args:
        examples: M, of the finite set that R is a mean over.
        noise: standard deviation of the Gaussian noise on the teacher's equilibria.
        batch: examples of a step.
        eta: eta_n = eta / sqrt(n).
        ks: of NPG, in increasing order; implicit differentiation runs beside them.
    """
    kept = sorted({round(math.exp(i / (POINTS - 1) * math.log(steps))) for i in range(POINTS)})
    weights = torch.arange(1, steps + 1, dtype=DTYPE).rsqrt()
    rows = []
    for k in (None, *ks):
        grad = NPG(k=k, lam=lam) if k else Implicit(solver=Broyden(max_steps=2 * dim + 10, tol=1e-12))
        descent = Descent(seeds, dim, spectral_norm, examples, noise)
        squares, errors = descent.run(grad, batch=batch, steps=steps, eta=eta)
        means = (weights * squares).cumsum(1) / weights.cumsum(0)
        for i, seed in enumerate(seeds):
            rows.append(
                {
                    "k": k,
                    "seed": seed,
                    "eps": significant(errors[i].max(), 4),
                    "largest_gradient": significant(squares[i].max().sqrt(), 4),
                    "radius": significant(squares[i, -max(1, int(TAIL * steps)) :].mean().sqrt(), 4),
                    "mean": [significant(means[i, n - 1], 4) for n in kept],
                }
            )
    return {"n": kept, "rows": rows, "claims": claims(rows, kept, ks)}


class Descent:
    """The layers and data of all seeds, and SGD on their input weights U and biases b.

    Args:
        noise: standard deviation of the Gaussian noise on the teacher's equilibria.
    """

    def __init__(self, seeds: Sequence[int], dim: int, spectral_norm: float, examples: int, noise: float) -> None:
        drawn = [self._draw(seed, dim, spectral_norm, examples, noise) for seed in seeds]
        self.weight, teacher, start, self.x, extra = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        none = torch.zeros(len(seeds), 1, dim, dtype=DTYPE)
        self.y = self.equilibrium(teacher, none, torch.zeros_like(self.x)) + extra
        self.trained = [start.requires_grad_(), none.clone().requires_grad_()]
        self.order = torch.Generator().manual_seed(0)

    @staticmethod
    def _draw(seed: int, dim: int, spectral_norm: float, examples: int, noise: float) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        layer, other = (SyntheticMap(dim=dim, spectral_norm=spectral_norm, activation="tanh") for _ in range(2))
        parts = layer.weight @ layer.weight.T / spectral_norm, layer.input_weight, other.input_weight
        x, extra = torch.randn(2, examples, dim)
        return tuple(part.detach().to(DTYPE) for part in (*parts, x, noise * extra))

    def run(self, grad: GradientEstimator, *, batch: int, steps: int, eta: float) -> tuple[Tensor, Tensor]:
        """Return |grad R|^2 before every step, and the error of that step's estimate, both (S, steps)."""
        squares, errors = torch.zeros(2, len(self.x), steps, dtype=DTYPE)
        z = torch.zeros_like(self.x)
        for n in range(1, steps + 1):
            rows = torch.randint(self.x.shape[1], (batch,), generator=self.order)
            u, b = (parameter.detach() for parameter in self.trained)
            z = self.equilibrium(u, b, z)
            pullback = self.pullback(z)
            squares[:, n - 1] = _square(self.exact(pullback, slice(None)))
            estimate = self.estimate(grad, z, rows)
            wrong = [a - b for a, b in zip(estimate, self.exact(pullback, rows), strict=True)]
            errors[:, n - 1] = _square(wrong).sqrt()
            with torch.no_grad():
                for parameter, part in zip(self.trained, estimate, strict=True):
                    parameter -= eta / math.sqrt(n) * part
        return squares, errors

    def estimate(self, grad: GradientEstimator, z: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the estimate of the gradient of the mean loss of these examples, to U (S, D, D) and b (S, 1, D)."""
        u, b = self.trained
        injection, start = self.x[:, rows] @ u.mT + b, z[:, rows]

        def f(z: Tensor) -> Tensor:  # (S * rows, D): every example of every seed is a problem of its own
            return torch.tanh(z.view(start.shape) @ self.weight.mT + injection).flatten(0, 1)

        value = fixed_point(f, start.flatten(0, 1), solver=NO_SOLVE, grad=grad).value
        g = (start - self.y[:, rows]) / len(rows)
        return torch.autograd.grad(value, self.trained, g.flatten(0, 1))

    def equilibrium(self, u: Tensor, b: Tensor, z: Tensor) -> Tensor:
        """Return h* (S, M, D) of all examples by Newton's method from `z`."""
        injection, eye = self.x @ u.mT + b, torch.eye(z.shape[2], dtype=DTYPE)
        for _ in range(NEWTON_STEPS):
            fz = torch.tanh(z @ self.weight.mT + injection)
            if (fz - z).abs().max() < 1e-13:
                return z
            jacobian = (1 - fz**2)[..., None] * self.weight[:, None]
            z = z + torch.linalg.solve(eye - jacobian, fz - z)
        raise ArithmeticError(f"Newton's method has not found the equilibrium in {NEWTON_STEPS} steps")

    def pullback(self, z: Tensor) -> Tensor:
        """Return the exact gradient of every example's loss to its W h + U x + b, (S, M, D)."""
        slope = 1 - z**2
        jacobian = slope[..., None] * self.weight[:, None]
        return slope * exact_adjoint(jacobian, z - self.y)

    def exact(self, pullback: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the exact gradient of the mean loss of these examples, to U and b."""
        v, x = pullback[:, rows], self.x[:, rows]
        return v.mT @ x / v.shape[1], v.mean(dim=1, keepdim=True)


def _square(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.square().sum(dim=(1, 2)) for part in parts]).sum(dim=0)


def claims(rows: Sequence[dict[str, Any]], kept: Sequence[int], ks: Sequence[int]) -> list[dict[str, Any]]:
    """Return Theorem 3 and what follows from it, with their numbers; means are over seeds."""

    def mean(k: int | None, key: str) -> float:
        return fmean(row[key] for row in rows if row["k"] == k)

    def final(k: int | None, n: int = -1) -> float:
        return fmean(row["mean"][n] for row in rows if row["k"] == k)

    early = min((i for i, n in enumerate(kept) if n > 1), key=lambda i: abs(kept[i] - kept[-1] / 10))
    scaled = [final(None, i) * math.sqrt(kept[i]) / math.log(kept[i]) for i in (early, -1)]
    excess = [(final(k) - final(None)) / (mean(k, "eps") * mean(k, "largest_gradient")) for k in ks]
    pairs = list(zip((*ks,), (*ks[1:], None), strict=True))
    return [
        claim("implicit differentiation: the largest error eps of its gradient", mean(None, "eps"), "<", 1e-6),
        claim(
            f"exact: the mean falls as log N / sqrt(N): their ratio at N={kept[-1]} over that at N={kept[early]}",
            scaled[1] / scaled[0],
            "<=",
            1,
        ),
        claim(
            "phantom: the mean exceeds that of the exact gradient by O(eps): the largest excess over eps max|grad R|",
            max(excess),
            "<=",
            1,
        ),
        claim(
            "eps falls as k grows: the largest ratio of one k to the one before",
            max(mean(b, "eps") / mean(a, "eps") for a, b in pairs),
            "<",
            1,
        ),
        claim(
            "the radius falls with eps, up to 1 %: the largest ratio of one k to the one before",
            max(mean(b, "radius") / mean(a, "radius") for a, b in pairs),
            "<=",
            1.01,
        ),
    ]
