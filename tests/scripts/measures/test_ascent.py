"""Theorem 1's numbers against sampling, closed forms and finite differences."""

import pytest
import torch

from phantom import NPG, UPG
from scripts.running.measures import ascent
from tests.phantom.problems import DTYPE, randn

DIM = 4


def test_the_least_inner_product_is_below_every_sample_and_attained():
    a, exact = randn(DIM, 6, seed=1), randn(DIM, 6, seed=2)
    a = exact + 0.5 * a
    g = randn(20000, DIM, seed=3)
    samples = ((g @ a) * (g @ exact)).sum(1) / (g @ exact).square().sum(1)
    least = ascent.least_inner_product(a, exact).item()
    assert least <= samples.min() and samples.min() - least < 0.05


def test_a_case_is_the_condition_of_the_paper():
    """In the paper's convention, transposed: |A (I - dF/dh) - dF/dtheta| against sigma_min^2 / sigma_max."""
    jacobian, theta = ascent.random_problem(7, DIM)
    a = 0.5 * theta
    found = ascent.case(a, jacobian, theta)
    error = a.T @ (torch.eye(DIM, dtype=DTYPE) - jacobian.T) - theta.T
    gram = torch.linalg.eigvalsh(theta @ theta.T)
    expected = torch.linalg.eigvalsh(error.T @ error)[-1].sqrt() / (gram[0] / gram[-1].sqrt())
    assert found["ratio"] == pytest.approx(float(expected), rel=1e-9)
    exact = torch.linalg.inv(torch.eye(DIM, dtype=DTYPE) - jacobian) @ theta
    norms = [torch.linalg.svdvals(m)[0] for m in (error, jacobian, a - exact)]
    assert found["eq18"] == pytest.approx(float(norms[0] / ((1 + norms[1]) * norms[2])), rel=1e-9)


def test_the_random_problems_have_the_condition_they_promise():
    for seed in range(5):
        jacobian, theta = ascent.random_problem(seed, DIM)
        assert theta.shape == (DIM, DIM + seed % 3)
        assert 0.1 <= torch.linalg.svdvals(jacobian)[0] <= 0.9
        assert torch.linalg.cond(theta).item() == pytest.approx(1 + 3 * (seed % 4))


def test_the_jacobians_of_a_layer():
    layer = ascent.Layer(5, DIM, 0.8, start_steps=2)
    weight, u, x = layer.map.weight.detach(), layer.map.input_weight.detach(), layer.x[0]

    def f(z: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.tanh(weight @ z + u @ x + bias)

    none = torch.zeros(DIM, dtype=DTYPE)
    z = none
    for _ in range(300):
        z = f(z, none)
    slope = torch.diag(1 - z**2)
    torch.testing.assert_close(layer.jacobian, slope @ weight)
    eye = torch.eye(DIM, dtype=DTYPE)
    closed = slope @ torch.cat([torch.kron(eye, z[None]), torch.kron(eye, x[None]), eye], dim=1)
    torch.testing.assert_close(layer.theta_jacobian, closed)

    # UPG's A is the Jacobian of its damped steps from the coarse start; here its last columns, those of the bias
    start, step = f(f(none, none), none), 1e-6

    def unrolled(bias: torch.Tensor) -> torch.Tensor:
        z = start
        for _ in range(3):
            z = 0.6 * f(z, bias) + 0.4 * z
        return z

    differences = torch.stack([(unrolled(step * e) - unrolled(-step * e)) / (2 * step) for e in eye], dim=1)
    a = layer.phantom_jacobian(UPG(k=3, lam=0.6))
    torch.testing.assert_close(a[:, -DIM:], differences, rtol=1e-6, atol=1e-8)
    # NPG's is Eq. (17) with the Jacobians of the start
    here = torch.diag(1 - f(start, none) ** 2)
    b = 0.6 * here @ weight + 0.4 * eye
    series = 0.6 * (eye + b + b @ b) @ here
    torch.testing.assert_close(layer.phantom_jacobian(NPG(k=3, lam=0.6))[:, -DIM:], series)


def test_small_study():
    found = ascent.measure(
        seeds=[0, 1, 2, 3],
        dim=DIM,
        lams=[0.5],
        matrix_ks=[1, 128],
        layer_ks=[1, 8],
        spectral_norms=[0.9],
        start_steps=2,
    )
    cases = [pair for row in found["rows"] for pair in zip(row["ratio"], row["least"], strict=True)]
    assert len(cases) == found["counts"]["cases"] == 4 * (2 + 4)
    inside = [least for ratio, least in cases if ratio < 1]
    assert 0 < len(inside) == found["counts"]["condition holds"] < len(cases)
    assert found["claims"][0]["measured"] == pytest.approx(min(inside), rel=1e-3)
    assert all(one["holds"] for one in found["claims"])
