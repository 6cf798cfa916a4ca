"""Theorem 2's numbers against powers of B and finite differences."""

import pytest
import torch

from models.synthetic import SyntheticMap
from phantom import NPG, UPG
from scripts.running.measures import convergence
from tests.phantom.problems import DTYPE

DIM = 4


def test_the_rate_of_a_geometric_series():
    ks = list(range(1, 60))
    assert convergence.rate(ks, [3 * 0.7**k for k in ks]) == pytest.approx(0.7)
    assert str(convergence.rate([1, 2], [0.5, 0.4])) == "nan", "too early to read a rate"


def test_the_exact_jacobian_is_that_of_finite_differences():
    layer = convergence.Layer(2, DIM, 0.9)
    torch.manual_seed(2)
    other = SyntheticMap(dim=DIM, spectral_norm=0.9, activation="tanh").to(DTYPE)

    def equilibrium(x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros(1, DIM, dtype=DTYPE)
        with torch.no_grad():
            for _ in range(400):
                z = other.bind(x[None])(z)
        return z[0]

    x, step = layer.x[0].detach(), 1e-6
    eye = torch.eye(DIM, dtype=DTYPE)
    columns = [(equilibrium(x + step * e) - equilibrium(x - step * e)) / (2 * step) for e in eye]
    torch.testing.assert_close(layer.exact, torch.stack(columns, dim=1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", [NPG, UPG])
def test_the_error_is_that_of_powers_of_b(estimator):
    layer = convergence.Layer(4, DIM, 0.9)
    for k, lam in ((1, 0.5), (4, 0.5), (3, 1.0)):
        b = lam * layer.jacobian + (1 - lam) * torch.eye(DIM, dtype=DTYPE)
        left = torch.linalg.matrix_power(b, k) @ layer.exact
        expected = torch.linalg.svdvals(left)[0] / torch.linalg.svdvals(layer.exact)[0]
        assert layer.error(layer.z_star, estimator(k=k, lam=lam)) == pytest.approx(float(expected), rel=1e-9)


def test_small_study():
    found = convergence.measure(
        seeds=[0], dim=DIM, spectral_norm=0.8, lams=[0.5, 1.0], ks=[1, 5, 10, 15, 20, 30, 40, 80], start_steps=2
    )
    by_text = {one["claim"].split(":")[0]: one for one in found["claims"]}
    assert by_text["(i) the Neumann series converges"]["holds"]
    assert by_text["(ii) the damped unrolling converges from an inexact start, too"]["holds"]
    assert by_text["from an inexact start NPG keeps a bias, UPG does not"]["holds"]
    rows = {(row["estimator"], row["start"], row["lam"]): row["error"] for row in found["rows"]}
    assert len(rows) == 8
    bias = by_text["from an inexact start NPG keeps a bias, UPG does not"]["measured"]
    assert bias == min(rows["NPG", "inexact", lam][-1] for lam in (0.5, 1.0))


def test_damping_speeds_up_a_layer_with_negative_eigenvalues():
    """lam mu + 1 - lam is 0.05 for mu = -0.9 at lam = 0.5: there the paper's remark on a small lam does not hold."""
    one = convergence.counterexample(DIM, 0.9, [0.5, 1.0])
    assert not one["holds"] and one["measured"] < -0.1
