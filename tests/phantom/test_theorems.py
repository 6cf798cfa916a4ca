"""Theorems 1 and 2 of the paper, checked in numbers on random contractions."""

import pytest
import torch
from torch import Tensor

from phantom import NPG, UPG, Broyden, FixedPoint, Implicit, fixed_point
from phantom.diagnostics import ascent_margin, conditioning, exact_adjoint, neumann_matrix
from tests.phantom.problems import DTYPE, randn

ROUNDING = 1e-9
WIDTH = 5


def contraction(seed: int, width: int = WIDTH) -> Tensor:
    """Return a random J with a spectral norm between 0.1 and 0.9."""
    matrix = randn(width, width, seed=seed)
    norm = 0.1 + 0.8 * torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
    return matrix * norm / torch.linalg.matrix_norm(matrix, ord=2)


def orthogonal_rows(seed: int, spread: float, width: int, parameters: int) -> Tensor:
    """Return dF/dtheta (width, parameters) with singular values between 1 and `spread`."""
    u, _ = torch.linalg.qr(randn(width, width, seed=seed))
    v, _ = torch.linalg.qr(randn(parameters, parameters, seed=seed + 1))
    return u @ torch.diag(torch.linspace(1, spread, width, dtype=DTYPE)) @ v[:width]


# ---- Theorem 1


def test_a_positive_margin_means_ascent():
    """Over random contractions, k and lam: where the margin is positive, so is every inner product, for all g at once.

    a^T g . e^T g = g^T a e^T g is positive for every g exactly where the symmetric part of a e^T is positive definite.
    """
    positive = negative = wrong_direction = 0
    for seed in range(60):
        jacobian = contraction(seed)
        theta = orthogonal_rows(seed + 100, spread=1 + seed % 4, width=WIDTH, parameters=WIDTH + seed % 3)
        exact = torch.linalg.solve(torch.eye(WIDTH, dtype=DTYPE) - jacobian, theta)
        for k in (1, 2, 4, 8, 16):
            for lam in (0.3, 0.6, 1.0):
                a = neumann_matrix(jacobian, k=k, lam=lam) @ theta
                least = torch.linalg.eigvalsh(a @ exact.T + exact @ a.T)[0]
                if ascent_margin(a, jacobian, theta) > 0:
                    positive += 1
                    assert least > 0, (seed, k, lam)
                else:
                    negative += 1
                    wrong_direction += bool(least <= 0)
    assert positive > 100 and negative > 100, "both sides of the condition must occur"
    assert wrong_direction > 0, "without the condition some direction must be lost, or the claim is empty"


def test_the_margin_is_the_condition_of_the_paper():
    """The same numbers in the paper's own convention, transposed, written out term by term: Eq. (6)."""
    jacobian, theta = contraction(3), orthogonal_rows(4, 2.0, WIDTH, 8)
    a = neumann_matrix(jacobian, k=3, lam=0.5) @ theta
    paper_a, paper_h, paper_theta = a.T, jacobian.T, theta.T
    error = paper_a @ (torch.eye(WIDTH, dtype=DTYPE) - paper_h) - paper_theta
    singular = torch.linalg.eigvalsh(paper_theta.T @ paper_theta).sqrt()
    expected = singular[0] ** 2 / singular[-1] - torch.linalg.eigvalsh(error.T @ error)[-1].sqrt()
    torch.testing.assert_close(ascent_margin(a, jacobian, theta), expected, rtol=ROUNDING, atol=0)


def test_no_margin_without_full_column_rank():
    """Fewer parameters than unknowns: sigma_min is zero, however good the estimate."""
    for seed in range(20):
        jacobian, theta = contraction(seed), randn(WIDTH, WIDTH - 1, seed=seed)
        exact = torch.linalg.solve(torch.eye(WIDTH, dtype=DTYPE) - jacobian, theta)
        assert ascent_margin(exact, jacobian, theta) <= 0
        assert ascent_margin(neumann_matrix(jacobian, k=3, lam=0.5) @ theta, jacobian, theta) < -1e-6
    # and with as many, but of deficient rank
    theta = randn(WIDTH, 2, seed=1) @ randn(2, WIDTH, seed=2)
    assert ascent_margin(neumann_matrix(jacobian, k=3, lam=0.5) @ theta, jacobian, theta) < 0


def test_the_exact_matrix_has_the_whole_margin():
    jacobian, theta = contraction(7), orthogonal_rows(8, 3.0, WIDTH, 9)
    exact = torch.linalg.solve(torch.eye(WIDTH, dtype=DTYPE) - jacobian, theta)
    torch.testing.assert_close(ascent_margin(exact, jacobian, theta).item(), 1 / 3, rtol=1e-9, atol=1e-9)


# ---- Theorem 2


def test_the_neumann_matrix_is_eq_17():
    jacobian, k, lam = contraction(11), 4, 0.7
    eye = torch.eye(WIDTH, dtype=DTYPE)
    b = lam * jacobian + (1 - lam) * eye
    torch.testing.assert_close(neumann_matrix(jacobian, k=k, lam=lam), lam * (eye + b + b @ b + b @ b @ b))
    # and NPG's adjoint is its transpose
    x = torch.zeros(1, WIDTH, dtype=DTYPE, requires_grad=True)
    g = randn(1, WIDTH, seed=12)
    solver = FixedPoint(max_steps=1, tol=None)
    value = fixed_point(lambda z: z @ jacobian.T + x, torch.zeros_like(x), solver=solver, grad=NPG(k=k, lam=lam)).value
    (u,) = torch.autograd.grad(value, x, g)
    torch.testing.assert_close(u, g @ neumann_matrix(jacobian, k=k, lam=lam))


@pytest.mark.parametrize("lam", [0.4, 1.0])
@pytest.mark.parametrize("estimator", [UPG, NPG])
def test_the_error_at_an_exact_equilibrium_is_bounded_by_powers_of_b(estimator, lam):
    """|error of k terms| <= |B^k| |exact adjoint|, and it falls at the rate of the spectral radius of B."""
    weight = randn(6, 6, seed=21)
    weight = 0.97 * weight / torch.linalg.matrix_norm(weight, ord=2)
    x = randn(3, 6, seed=22).requires_grad_()
    g = randn(3, 6, seed=23)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T) + x

    z_star = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(500):
            z_star = f(z_star)
    jacobian = (1 - torch.tanh(z_star @ weight.T) ** 2)[:, :, None] * weight
    exact = exact_adjoint(jacobian, g)
    b = lam * jacobian + (1 - lam) * torch.eye(6, dtype=DTYPE)
    radius = torch.linalg.eigvals(b).abs().amax(dim=1)
    errors = {}
    for k in (1, 2, 4, 8, 16, 30, 40):
        value = fixed_point(f, z_star, solver=FixedPoint(max_steps=0, tol=None), grad=estimator(k=k, lam=lam)).value
        (u,) = torch.autograd.grad(value, x, g)
        errors[k] = (u - exact).norm(dim=1)
        bound = torch.linalg.matrix_norm(torch.linalg.matrix_power(b, k), ord=2) * exact.norm(dim=1)
        assert (errors[k] <= bound * (1 + ROUNDING) + ROUNDING).all()
        assert (errors[k] > 1e-3 * bound).all(), "the bound must be near, or it tests nothing"
    rate = (errors[40] / errors[30]) ** (1 / 10)
    torch.testing.assert_close(rate, radius, rtol=0.1, atol=0)


@pytest.mark.parametrize("lam", [0.4, 1.0])
def test_from_an_inexact_start_upg_still_tends_to_the_exact_gradient(lam):
    """Its states converge while it unrolls. NPG keeps the Jacobian of the start, and its bias."""
    weight = contraction(31, 6).requires_grad_()
    x, g, start = randn(3, 6, seed=32), randn(3, 6, seed=33), 3 * randn(3, 6, seed=34)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T) + x

    def gradient(grad, z0: Tensor, solver) -> Tensor:
        return torch.autograd.grad(fixed_point(f, z0, solver=solver, grad=grad).value, weight, g)[0]

    tight = Broyden(max_steps=60, tol=1e-14)
    exact = gradient(Implicit(solver=tight), torch.zeros_like(x), tight)
    nothing = FixedPoint(max_steps=0, tol=None)
    upg = [(gradient(UPG(k=k, lam=lam), start, nothing) - exact).norm() / exact.norm() for k in (1, 20, 300)]
    assert upg[0] > 0.1 and upg[2] < ROUNDING and upg[1] < upg[0]
    assert (gradient(NPG(k=300, lam=lam), start, nothing) - exact).norm() > 0.1 * exact.norm()


def test_damping_conditions_the_phantom_matrix():
    """Sec. 2.4: a small lam keeps A well conditioned, a large k spoils it."""
    jacobian = contraction(41) / torch.linalg.matrix_norm(contraction(41), ord=2) * 0.99
    values = {(k, lam): conditioning(neumann_matrix(jacobian, k=k, lam=lam)) for k in (2, 20) for lam in (0.1, 0.9)}
    for (k, lam), value in values.items():
        singular = torch.linalg.svdvals(neumann_matrix(jacobian, k=k, lam=lam))
        torch.testing.assert_close(value, singular[0] / singular[-1])
    assert values[2, 0.1] < values[2, 0.9] < values[20, 0.9] and values[2, 0.1] < values[20, 0.1]


def test_the_margin_of_theorem_1_squares_the_smallest_singular_value():
    """sigma_min^2 / sigma_max of rows with singular values 3 to 9 is 1, where A is exact."""
    jacobian, theta = contraction(7), 3 * orthogonal_rows(8, 3.0, WIDTH, 9)
    exact = torch.linalg.solve(torch.eye(WIDTH, dtype=DTYPE) - jacobian, theta)
    torch.testing.assert_close(ascent_margin(exact, jacobian, theta).item(), 1.0, rtol=1e-9, atol=1e-9)
