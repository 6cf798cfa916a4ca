"""Diagnostics against dense linear algebra and numpy."""

import numpy
import pytest
import torch
from torch import Tensor

from phantom.diagnostics import (
    ascent_margin,
    best_damping,
    cosine,
    damped_radius,
    dense_jacobian,
    exact_adjoint,
    norm_ratio,
    ritz_values,
    spectral_radius,
)
from tests.phantom.problems import DTYPE, randn, rotation, with_radius

DENSE = 1e-10  # against dense linear algebra
KRYLOV = 1e-3  # of an Arnoldi estimate with far fewer steps than unknowns


def linear(jacobian: Tensor):
    """Return the map of (B, D) states with the given (B, D, D) or (D, D) Jacobians."""
    return lambda z: torch.einsum("...ij,...j->...i", jacobian, z)


# ---- spectral radius


@pytest.mark.parametrize("angle", [0.0, 0.4, torch.pi / 2, 3.0])
def test_radius_of_a_rotation(angle):
    """A Rayleigh quotient gives 0.9 cos(angle); a quarter turn would look like zero."""
    radius = spectral_radius(linear(rotation(angle, 0.9)), torch.zeros(1, 2, dtype=DTYPE))
    torch.testing.assert_close(radius, torch.full((1,), 0.9, dtype=DTYPE), rtol=DENSE, atol=0)


@pytest.mark.parametrize("lam", [0.3, 0.7, 1.0])
def test_radius_of_the_damped_map(lam):
    jacobian = torch.stack([with_radius(radius, 9, seed=seed) for seed, radius in ((1, 0.4), (2, 0.9), (3, 1.7))])
    expected = torch.linalg.eigvals(lam * jacobian + (1 - lam) * torch.eye(9, dtype=DTYPE)).abs().amax(dim=1)
    measured = spectral_radius(linear(jacobian), torch.zeros(3, 9, dtype=DTYPE), lam=lam)
    torch.testing.assert_close(measured, expected, rtol=DENSE, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_radius_of_a_large_nonsymmetric_map(seed):
    """200 unknowns, 120 vjps; the eigenvalues of a random matrix fill a disc, the hardest case for Arnoldi."""
    jacobian = with_radius(0.95, 200, seed=seed)
    measured = spectral_radius(linear(jacobian), torch.zeros(1, 200, dtype=DTYPE), num_steps=120)
    assert measured.item() == pytest.approx(0.95, rel=KRYLOV)
    v = randn(200, seed=seed + 50)
    assert abs(v @ jacobian @ v / v.dot(v)) < 0.5, "a Rayleigh quotient must be wrong here, or this shows nothing"


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_radius_when_the_krylov_space_closes_early(lam):
    """J = -0.5 I closes after one step: what is left of the small matrix must not count as an eigenvalue."""
    measured = spectral_radius(lambda z: -0.5 * z, torch.zeros(2, 7, dtype=DTYPE), lam=lam)
    torch.testing.assert_close(measured, torch.full((2,), abs(1 - 1.5 * lam), dtype=DTYPE), rtol=DENSE, atol=0)
    low_rank = randn(8, 2, seed=1) @ randn(2, 8, seed=2) / 10
    expected = torch.linalg.eigvals(lam * low_rank + (1 - lam) * torch.eye(8, dtype=DTYPE)).abs().amax()
    measured = spectral_radius(linear(low_rank), torch.zeros(1, 8, dtype=DTYPE), lam=lam)
    torch.testing.assert_close(measured[0], expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [1e-11, 1e-12, 1e-13])
def test_eigenvalues_that_are_nearly_one(size):
    """The Krylov space all but closes: what remains is short, and of length one afterwards."""
    jacobian = size * randn(6, 6, seed=1) - torch.eye(6, dtype=DTYPE)
    expected = damped_radius(torch.linalg.eigvals(jacobian)[None], 0.5)
    radius = spectral_radius(linear(jacobian), torch.zeros(4, 6, dtype=DTYPE), lam=0.5)
    torch.testing.assert_close(radius, expected.expand(4), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1e-15, 1e-13, 1e10])
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
def test_radius_of_any_size(size, dtype):
    jacobian = with_radius(size, 6, seed=2).to(dtype)
    radius = spectral_radius(linear(jacobian), torch.zeros(3, 6, dtype=dtype))
    torch.testing.assert_close(radius, torch.full((3,), size, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_state_has_empty_diagnostics(shape):
    z = torch.zeros(shape, dtype=DTYPE)
    assert torch.equal(spectral_radius(torch.sin, z), torch.zeros(shape[0], dtype=DTYPE))
    assert dense_jacobian(torch.sin, z).shape == (*shape, shape[1])


@pytest.mark.parametrize("num_steps", [0, -1, 2.0])
def test_a_number_of_steps_that_is_none(num_steps):
    with pytest.raises(ValueError, match=r"num_steps=.* must be an integer >= 1"):
        spectral_radius(torch.sin, torch.zeros(1, 2), num_steps=num_steps)


def test_radius_is_measured_at_z_and_under_no_grad():
    weight = with_radius(0.9, 6, seed=4)
    z = randn(3, 6, seed=5)
    jacobian = (1 - torch.tanh(z @ weight.T) ** 2)[:, :, None] * weight
    with torch.no_grad():
        measured = spectral_radius(lambda z: torch.tanh(z @ weight.T), z)
    torch.testing.assert_close(measured, torch.linalg.eigvals(jacobian).abs().amax(dim=1), rtol=DENSE, atol=0)
    assert not measured.requires_grad


def test_radius_of_a_tuple_state_in_float32():
    jacobian = with_radius(0.8, 6, seed=6).float()

    def f(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tuple((torch.cat(z, dim=1) @ jacobian.T).split([2, 4], dim=1))

    measured = spectral_radius(f, (torch.zeros(2, 2), torch.zeros(2, 4)))
    torch.testing.assert_close(measured, torch.full((2,), 0.8), rtol=1e-4, atol=0)


def test_ritz_values_are_the_eigenvalues():
    jacobian = torch.stack([with_radius(radius, 8, seed=seed) for seed, radius in ((21, 0.7), (22, 1.4))])
    found = ritz_values(linear(jacobian), torch.zeros(2, 8, dtype=DTYPE), num_steps=8)
    for i in range(2):
        expected = torch.linalg.eigvals(jacobian[i])
        distance = (found[i][:, None] - expected).abs()
        assert distance.amin(dim=0).max() < 1e-9 and distance.amin(dim=1).max() < 1e-9


def test_best_damping_minimises_the_radius():
    """Eigenvalues -1.5 and 0.5: |1 - 2.5 lam| = |1 - 0.5 lam| at lam = 2/3, where both are 2/3."""
    eigenvalues = torch.tensor([[-1.5, 0.5]], dtype=torch.complex128)
    assert best_damping(eigenvalues) == pytest.approx(2 / 3, abs=0.01)
    assert damped_radius(eigenvalues, 2 / 3).item() == pytest.approx(2 / 3)
    assert best_damping(torch.tensor([[0.9]], dtype=torch.complex128)) == 1.0
    # of two problems, the mean counts: for each alone another lam is best
    both = torch.tensor([[-1.5, 0.5], [0.9j, 0.9j]], dtype=torch.complex128)
    radii = [damped_radius(both, lam / 1000).mean().item() for lam in range(1, 1001)]
    assert damped_radius(both, best_damping(both)).mean().item() == pytest.approx(min(radii), abs=1e-3)


def test_radius_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    spectral_radius(lambda z: 0.5 * z, torch.zeros(2, 3))
    assert torch.equal(torch.get_rng_state(), state)


# ---- Jacobians and adjoints


def test_dense_jacobian_has_outputs_as_rows():
    weight, z = randn(5, 5, seed=7), randn(3, 5, seed=8)
    jacobian = dense_jacobian(lambda z: torch.tanh(z @ weight.T), z)
    for i in range(3):
        expected = torch.autograd.functional.jacobian(lambda z: torch.tanh(weight @ z), z[i])
        torch.testing.assert_close(jacobian[i], expected, rtol=DENSE, atol=1e-14)
    step = 1e-6 * randn(3, 5, seed=9)
    change = torch.tanh((z + step) @ weight.T) - torch.tanh((z - step) @ weight.T)
    torch.testing.assert_close(torch.einsum("bij,bj->bi", jacobian, 2 * step), change, rtol=1e-6, atol=1e-14)


def test_dense_jacobian_couples_the_parts_of_a_tuple():
    weight = randn(6, 6, seed=10)

    def f(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out = torch.cat((z[0].flatten(1), z[1]), dim=1) @ weight.T
        return out[:, :4].reshape(-1, 1, 2, 2), out[:, 4:]

    jacobian = dense_jacobian(f, (torch.zeros(2, 1, 2, 2, dtype=DTYPE), torch.zeros(2, 2, dtype=DTYPE)))
    torch.testing.assert_close(jacobian, weight.expand(2, 6, 6), rtol=DENSE, atol=0)


def test_exact_adjoint_solves_its_equation():
    jacobian, g = torch.stack([with_radius(0.9, 6, seed=seed) for seed in (11, 12)]), randn(2, 6, seed=13)
    u = exact_adjoint(jacobian, g)
    for i in range(2):
        torch.testing.assert_close(jacobian[i].T @ u[i] + g[i], u[i], rtol=DENSE, atol=DENSE)
        series, term = torch.zeros(6, dtype=DTYPE), g[i]
        for _ in range(600):
            series, term = series + term, jacobian[i].T @ term
        torch.testing.assert_close(u[i], series, rtol=1e-8, atol=1e-8)


# ---- gradients as one vector


def test_cosine_and_norm_ratio_are_those_of_numpy():
    estimate = [randn(3, 4, seed=14), randn(5, seed=15)]
    exact = [a + 0.5 * randn(*a.shape, seed=16 + i) for i, a in enumerate(estimate)]
    a, b = (numpy.concatenate([t.numpy().ravel() for t in tensors]) for tensors in (estimate, exact))
    expected = a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b)
    assert cosine(estimate, exact).item() == pytest.approx(expected, rel=1e-12)
    ratio = norm_ratio(estimate, exact).item()
    assert ratio == pytest.approx(numpy.linalg.norm(a) / numpy.linalg.norm(b), rel=1e-12)
    assert cosine([-2 * t for t in exact], exact).item() == pytest.approx(-1)
    assert norm_ratio([-2 * t for t in exact], exact).item() == pytest.approx(2)


def test_small_float32_gradients_do_not_underflow():
    tiny = [torch.full((4,), 1e-25)]
    assert cosine(tiny, tiny).item() == pytest.approx(1) and norm_ratio(tiny, tiny).item() == pytest.approx(1)
    tiny = [torch.full((4,), 1e-90, dtype=DTYPE)]
    assert cosine(tiny, tiny).item() == pytest.approx(1)


def test_none_is_a_gradient_of_zeros():
    a, b = randn(3, seed=1), randn(3, seed=2)
    for estimate, exact in (([a, b], [a, None]), ([a, None, None], [a, b, None])):
        zeros = [[torch.zeros(3, dtype=DTYPE) if t is None else t for t in part] for part in (estimate, exact)]
        assert torch.equal(cosine(estimate, exact), cosine(*zeros))
        assert torch.equal(norm_ratio(estimate, exact), norm_ratio(*zeros))


def test_gradients_must_match():
    with pytest.raises(ValueError, match="got 2 and 1"):
        cosine([torch.ones(2), torch.ones(2)], [torch.ones(2)])


def test_a_map_that_writes_to_its_argument_is_left_its_own_copy():
    weight, z = with_radius(0.7, 4, seed=2), randn(3, 4, seed=3)
    radii = [spectral_radius(lambda z, act=act: act(z) @ weight.mT, z) for act in (torch.relu, torch.relu_)]
    assert torch.equal(*radii) and radii[0].max() > 0


def test_the_default_device_does_not_matter():
    """A default of cuda stands for all; meta tensors hold no numbers, so that one would be noticed."""
    with torch.device("meta"):
        z = torch.full((2, 3), 0.2, device="cpu")
        assert torch.allclose(spectral_radius(lambda z: 0.5 * z, z), torch.full((2,), 0.5, device="cpu"))
        assert float(cosine([z], [2 * z])) == pytest.approx(1)
        matrix = torch.diag(torch.full((3,), 0.5, device="cpu"))
        assert float(ascent_margin(matrix, matrix, matrix)) == pytest.approx(0.5 - 0.25)
