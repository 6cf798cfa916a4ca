"""Theorem 3's exact gradients against finite differences, and its weighted mean by hand."""

import math

import pytest
import torch

from phantom import NPG
from scripts.running.measures import descent
from tests.phantom.problems import DTYPE


def problem() -> descent.Descent:
    return descent.Descent([0, 1], 3, 0.8, 5, 0.3)


def test_equilibria_are_fixed_points_by_iteration():
    d = problem()
    u, b = (parameter.detach() for parameter in d.trained)
    z = torch.zeros_like(d.x)
    for _ in range(400):
        z = torch.tanh(z @ d.weight.mT + d.x @ u.mT + b)
    torch.testing.assert_close(d.equilibrium(u, b, torch.zeros_like(z)), z, rtol=0, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(d.weight)
    assert (eigenvalues > 0).all() and eigenvalues.amax().item() == pytest.approx(0.8)


def test_the_exact_gradient_is_that_of_finite_differences():
    d, step = problem(), 1e-6
    u, b = (parameter.detach() for parameter in d.trained)
    start = torch.zeros_like(d.x)

    def risk(u: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (d.equilibrium(u, b, start) - d.y).square().sum(2).mean(1) / 2

    du, db = d.exact(d.pullback(d.equilibrium(u, b, start)), slice(None))
    for i in range(3):
        for j in range(3):
            e = torch.zeros(3, 3, dtype=DTYPE)
            e[i, j] = step
            torch.testing.assert_close(
                (risk(u + e, b) - risk(u - e, b)) / (2 * step), du[:, i, j], rtol=1e-5, atol=1e-8
            )
        e = torch.zeros(3, dtype=DTYPE)
        e[i] = step
        torch.testing.assert_close((risk(u, b + e) - risk(u, b - e)) / (2 * step), db[:, 0, i], rtol=1e-5, atol=1e-8)


def test_the_estimate_tends_to_the_exact_gradient_of_its_examples():
    d, rows = problem(), torch.tensor([4, 0, 4])
    z = d.equilibrium(*(parameter.detach() for parameter in d.trained), torch.zeros_like(d.x))
    for found, exact in zip(d.estimate(NPG(k=400, lam=0.5), z, rows), d.exact(d.pullback(z), rows), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_small_study():
    settings = {"seeds": [0, 1], "dim": 3, "spectral_norm": 0.8, "examples": 6, "noise": 0.3, "batch": 3, "lam": 0.5}
    found = descent.measure(**settings, steps=12, eta=0.5, ks=[1, 6])
    assert [(row["k"], row["seed"]) for row in found["rows"]] == [(k, s) for k in (None, 1, 6) for s in (0, 1)]
    exact, coarse, fine = (found["rows"][i] for i in (0, 2, 4))
    assert exact["eps"] < 1e-9 < fine["eps"] < coarse["eps"]
    squares, _ = descent.Descent([0, 1], 3, 0.8, 6, 0.3).run(NPG(k=1, lam=0.5), batch=3, steps=12, eta=0.5)
    weights = [1 / math.sqrt(n) for n in range(1, 13)]
    mean = sum(w * s for w, s in zip(weights, squares[0].tolist(), strict=True)) / sum(weights)
    assert coarse["mean"][-1] == pytest.approx(mean, rel=1e-3) and found["n"][-1] == 12
    assert coarse["largest_gradient"] == pytest.approx(squares[0].max().sqrt().item(), rel=1e-3)
