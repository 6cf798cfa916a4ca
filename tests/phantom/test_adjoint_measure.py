"""The backward solve is judged by |J^T u + g - u| / |g|, whatever `stop` says, and its failure is marked."""

import pytest
import torch
from torch import Tensor

from phantom import Anderson, Broyden, FixedPoint, Implicit, fixed_point
from tests.phantom.problems import DTYPE, randn, with_radius

EXACT = 1e-9
STAY = FixedPoint(max_steps=0, tol=None)  # z0 is taken as the equilibrium
SOLVERS = {
    "plain": FixedPoint(max_steps=400, tol=1e-12),
    "anderson": Anderson(max_steps=100, tol=1e-12),
    "broyden": Broyden(max_steps=60, tol=1e-12),
}


def adjoint_of(jacobian: Tensor, g: Tensor, grad: Implicit):
    """Return u for f(z) = z J^T + x, whose gradient of x is u, and the statistics of the backward solve."""
    x = torch.zeros_like(g).requires_grad_()
    solution = fixed_point(lambda z: z @ jacobian.mT + x, torch.zeros_like(g), solver=STAY, grad=grad)
    (u,) = torch.autograd.grad(solution.value, x, g)
    return u, solution.stats.adjoint


def dense(jacobian: Tensor, g: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(len(jacobian), dtype=DTYPE) - jacobian.mT, g.mT).mT


@pytest.mark.parametrize("stop", ["relative", "absolute"])
@pytest.mark.parametrize("slope", [3.0, -3.0, 1.5])
def test_growth_is_not_progress(slope, stop):
    """u <- slope u + g grows, and |J^T u + g - u| / |J^T u + g| tends to a number below one."""
    grad = Implicit(solver=FixedPoint(max_steps=30, tol=1e-6, stop=stop))
    g = randn(3, 2, seed=1)
    u, adjoint = adjoint_of(slope * torch.eye(2, dtype=DTYPE), g, grad)
    assert torch.equal(u, g), "the one-step gradient"
    assert adjoint.fallback.all() and not adjoint.converged.any() and (adjoint.residual == 1).all()
    assert adjoint.diverged.all() == (abs(slope) == 3)


@pytest.mark.parametrize("make", [FixedPoint, Anderson, Broyden])
@pytest.mark.parametrize("steps", [3, 30])
def test_what_is_returned_is_the_best_or_the_one_step_gradient(make, steps):
    """A random J of radius 3: whatever the solver does, no gradient is worse by its own equation than u = 0."""
    jacobian, g = with_radius(3.0, 12, seed=2), randn(5, 12, seed=3)
    u, adjoint = adjoint_of(jacobian, g, Implicit(solver=make(max_steps=steps, tol=1e-10)))
    residual = (u @ jacobian + g - u).norm(dim=1) / g.norm(dim=1)
    kept = ~adjoint.fallback
    assert (residual[kept] < 1).all() and torch.equal(u[~kept], g[~kept])
    torch.testing.assert_close(adjoint.residual[kept], residual[kept], rtol=1e-9, atol=1e-14)
    assert torch.equal(adjoint.converged, adjoint.residual < 1e-10)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("stop", ["relative", "absolute"])
@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 1e8])
def test_the_scale_of_the_loss_does_not_matter(solver, stop, scale):
    jacobian, g = with_radius(0.8, 6, seed=4), randn(4, 6, seed=5)
    grad = Implicit(solver=type(solver)(max_steps=solver.max_steps, tol=solver.tol, stop=stop))
    u, adjoint = adjoint_of(jacobian, scale * g, grad)
    assert adjoint.converged.all() and not adjoint.fallback.any()
    torch.testing.assert_close(u / scale, dense(jacobian, g), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
@pytest.mark.parametrize("tol", [1e-5, None])
@pytest.mark.parametrize("dtype, scales", [(torch.float32, [1e-30, 1e-25, 1e19, 1e30]), (DTYPE, [1e-250, 1e250])])
def test_the_norm_of_a_cotangent_neither_vanishes_nor_overflows(dtype, scales, tol, norm):
    """In a batch with one of its size and one that is zero."""
    jacobian, grad = with_radius(0.8, 6, seed=4), Implicit(solver=Broyden(max_steps=40, tol=tol, norm=norm))
    for scale in scales:
        rows = torch.tensor([scale, scale, 1.0, 0.0], dtype=DTYPE)[:, None]
        g = randn(4, 6, seed=5) * rows
        u, adjoint = adjoint_of(jacobian.to(dtype), g.to(dtype), grad)
        truth, size = dense(jacobian, g / rows.clamp_min(1e-300)), rows.clamp_min(1e-300)
        torch.testing.assert_close(u.to(DTYPE) / size, truth, rtol=0, atol=1e-3)
        assert (adjoint.residual < 1e-5).all() and not adjoint.fallback.any()
        assert adjoint.converged.all() == (tol is not None)


@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
def test_the_residual_is_that_of_the_equation(norm):
    jacobian, g = with_radius(0.8, 6, seed=4), randn(4, 6, seed=5)
    u, adjoint = adjoint_of(jacobian, g, Implicit(solver=Broyden(max_steps=3, tol=None, norm=norm)))
    order = torch.inf if norm == "max" else 2
    length = [torch.linalg.vector_norm(v, ord=order, dim=1) for v in (u @ jacobian + g - u, g)]
    torch.testing.assert_close(adjoint.residual, length[0] / length[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(adjoint.trace[0], torch.ones(4, dtype=DTYPE), rtol=1e-15, atol=0)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("tol", [1e-12, None])
def test_a_zero_cotangent_has_a_zero_adjoint(solver, tol):
    jacobian, g = with_radius(0.8, 6, seed=4), randn(4, 6, seed=5)
    g[1] = 0
    solver = type(solver)(max_steps=solver.max_steps if tol else 60, tol=tol)
    u, adjoint = adjoint_of(jacobian, g, Implicit(solver=solver))
    assert torch.equal(u[1], torch.zeros_like(u[1])) and adjoint.residual[1] == 0 and not adjoint.fallback.any()
    assert adjoint.converged[1] == (tol is not None)
    rows = [0, 2, 3]
    exact = dense(jacobian, g)
    assert ((u - exact)[rows].norm() < 1e-3 * exact.norm()) if tol is None else True
    if tol is not None:
        torch.testing.assert_close(u, exact, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("stop", ["relative", "absolute"])
@pytest.mark.parametrize("constant", [1.0, 1e4])
def test_a_state_with_a_constant_part(solver, stop, constant):
    """(tanh(z W^T + c), c): the cotangent of the second part is the whole sum of the first part's."""
    weight, c = with_radius(0.7, 5, seed=6), (constant * randn(3, 5, seed=7)).requires_grad_()
    cotangent = randn(3, 5, seed=8), randn(3, 5, seed=9)

    def f(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.tanh(z[0] @ weight.mT + z[1] / constant), c

    z0 = (torch.zeros(3, 5, dtype=DTYPE), torch.zeros(3, 5, dtype=DTYPE))
    grad = Implicit(solver=type(solver)(max_steps=solver.max_steps, tol=solver.tol, stop=stop))
    solution = fixed_point(f, z0, solver=FixedPoint(max_steps=400, tol=1e-14), grad=grad)
    (found,) = torch.autograd.grad(solution.value, c, cotangent)
    assert solution.stats.adjoint.converged.all()
    for row in range(3):
        slope = torch.diag(1 - solution.value[0][row].detach() ** 2)
        inner = torch.linalg.solve(torch.eye(5, dtype=DTYPE) - (slope @ weight).mT, cotangent[0][row])
        expected = slope @ inner / constant + cotangent[1][row]
        torch.testing.assert_close(found[row], expected, rtol=EXACT, atol=EXACT)


def test_one_row_fails_alone():
    """Rows of slope 0.5, 3 and -1.5 under a plain iteration: one converges, two fall back, each marked for itself."""
    slope = torch.tensor([[0.5], [3.0], [-1.5]], dtype=DTYPE)
    x = torch.zeros(3, 4, dtype=DTYPE).requires_grad_()
    grad = Implicit(solver=FixedPoint(max_steps=60, tol=1e-12))
    solution = fixed_point(lambda z: slope * z + x, torch.zeros(3, 4, dtype=DTYPE), solver=STAY, grad=grad)
    g = randn(3, 4, seed=10)
    (u,) = torch.autograd.grad(solution.value, x, g)
    assert solution.stats.adjoint.fallback.tolist() == [False, True, True]
    torch.testing.assert_close(u, torch.cat((2 * g[:1], g[1:])), rtol=EXACT, atol=0)
