"""The synthetic map: a contraction of the given factor, and the claims of Figure 1 about its exact gradient."""

import pytest
import torch

from models.synthetic import SyntheticMap
from phantom import BPTT, Broyden, FixedPoint, Implicit, fixed_point

ACTIVATIONS = ("tanh", "relu")


def problem(activation: str, *, dim: int = 32, batch: int = 5, seed: int = 0) -> tuple[SyntheticMap, torch.Tensor]:
    torch.manual_seed(seed)
    return SyntheticMap(dim=dim, spectral_norm=0.9, activation=activation).double(), torch.randn(batch, dim).double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_its_equation_and_contracts(activation):
    map_, x = problem(activation)
    singular_values = torch.linalg.svdvals(map_.weight)
    assert singular_values[0].item() == pytest.approx(0.9, rel=1e-5)
    f = map_.bind(x)
    z, y = torch.randn_like(x), torch.randn_like(x)
    act = {"tanh": torch.tanh, "relu": torch.relu}[activation]
    for i in range(len(x)):
        expected = act(map_.weight @ z[i] + map_.input_weight @ x[i] + map_.bias)
        torch.testing.assert_close(f(z)[i], expected, rtol=1e-12, atol=1e-14)
    assert ((f(z) - f(y)).norm(dim=1) <= 0.9 * (z - y).norm(dim=1)).all()
    assert ((f(z) - f(y)).norm(dim=1) > 0.1 * (z - y).norm(dim=1)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_exact_gradient_by_two_roads(activation, seed):
    """100 iterations end below 1e-5; backpropagation through them and implicit differentiation agree (Section 3.1)."""
    gradients = []
    for grad in (BPTT(num_steps=100), Implicit(solver=Broyden(max_steps=20, tol=None))):
        map_, x = problem(activation, seed=seed)
        f = map_.bind(x)
        solution = fixed_point(f, torch.zeros_like(x), solver=FixedPoint(max_steps=100, tol=None), grad=grad)
        z = solution.value.detach()
        assert ((f(z) - z).norm(dim=1) / f(z).norm(dim=1)).max() < 1e-5
        (solution.value * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in map_.parameters()]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.9999


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_implicit_gradient_is_the_dense_solve(activation):
    map_, x = problem(activation, dim=6, batch=3)
    f = map_.bind(x)
    solution = fixed_point(
        f,
        torch.zeros_like(x),
        solver=Broyden(max_steps=60, tol=1e-13),
        grad=Implicit(solver=Broyden(max_steps=60, tol=1e-13)),
    )
    g = torch.randn_like(x)
    gradients = torch.autograd.grad(solution.value, list(map_.parameters()), g)
    z, eye = solution.z_star, torch.eye(6, dtype=x.dtype)
    pre = z @ map_.weight.T + x @ map_.input_weight.T + map_.bias
    slope = 1 - pre.tanh() ** 2 if activation == "tanh" else (pre > 0).double()
    # u solves (I - J^T) u = g with J = diag(slope) W; then each parameter sees the pre-activation's cotangent
    u = torch.stack([torch.linalg.solve(eye - (slope[i, :, None] * map_.weight).T, g[i]) for i in range(3)])
    v = slope * u
    for value, expected in zip(gradients, (v.T @ z, v.T @ x, v.sum(0)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim=0), "dim=0"),
        (dict(spectral_norm=1.0), "spectral_norm=1.0"),
        (dict(spectral_norm=0.0), "spectral_norm=0.0"),
        (dict(activation="gelu"), "activation='gelu'"),
    ],
)
def test_impossible_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        SyntheticMap(**(dict(dim=4, spectral_norm=0.9, activation="tanh") | changes))
