"""Figure 1's cosines are those of dense linear algebra."""

import pytest
import torch

from models.synthetic import SyntheticMap
from scripts.running.measures import cosine

SETTINGS = {
    "seeds": [3],
    "dim": 5,
    "batch": 2,
    "spectral_norm": 0.9,
    "lams": [0.5, 1.0],
    "max_k": 3,
    "max_steps": 400,
    "tol": 1e-13,
    "implicit_steps": 20,
}


def parameters_gradient(v: torch.Tensor, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient to W, U and b of sum_i <v_i, W z_i + U x_i + b>."""
    return torch.cat([(v.T @ z).flatten(), (v.T @ x).flatten(), v.sum(0)])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_cosines_are_those_of_a_dense_solve_and_a_series(activation):
    found = cosine.measure(activations=[activation], **SETTINGS)
    torch.manual_seed(3)
    layer = SyntheticMap(dim=5, spectral_norm=0.9, activation=activation).double()
    x, g = torch.randn(2, 2, 5, dtype=torch.float64)
    act = getattr(torch, activation)
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(500):
            z = act(z @ layer.weight.T + x @ layer.input_weight.T)
        slope = 1 - z**2 if activation == "tanh" else (z > 0).double()
        transposed = [(s[:, None] * layer.weight).T for s in slope]
        eye = torch.eye(5, dtype=torch.float64)
        u = torch.stack([torch.linalg.solve(eye - j, h) for j, h in zip(transposed, g, strict=True)])
        exact = parameters_gradient(slope * u, z, x)
        for row in found["rows"]:
            lam, total = row["lam"], torch.zeros_like(g)
            for k, value in enumerate(row["cosine"]):
                powers = [torch.linalg.matrix_power(lam * j + (1 - lam) * eye, k) for j in transposed]
                total = total + lam * torch.stack([p @ h for p, h in zip(powers, g, strict=True)])
                expected = torch.cosine_similarity(parameters_gradient(slope * total, z, x), exact, dim=0)
                assert value == pytest.approx(float(expected), abs=2e-6), row
    assert {(row["estimator"], row["lam"]) for row in found["rows"]} == {
        (e, x) for e in ("NPG", "UPG") for x in (0.5, 1)
    }
    assert found["checks"][0]["cosine"] > 0.9999 and found["checks"][0]["residual"] < 1e-13


def test_claims_read_the_curves():
    checks = [{"residual": 1e-6, "cosine": 0.99995}]
    curves = {
        ("tanh", "NPG", 0.5): [[0.5, 0.7], [0.7, 0.7]],
        ("tanh", "UPG", 0.5): [[0.5, 0.7], [0.7, 0.8]],
        ("tanh", "NPG", 1.0): [[0.6, 0.9], [0.6, 0.8]],
        ("tanh", "UPG", 1.0): [[0.9, 0.8], [0.9, 0.8]],
    }
    measured = [one["measured"] for one in cosine.claims(curves, checks, [0.5, 1.0], 1e-5)]
    # residual, agreement, fall of UPG lam=1, lead of lam=0.5 (none), least, difference
    assert measured == pytest.approx([1e-6, 0.99995, 0.1, 0.0, 0.5, 0.3])
    assert [one["holds"] for one in cosine.claims(curves, checks, [0.5, 1.0], 1e-5)] == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]
