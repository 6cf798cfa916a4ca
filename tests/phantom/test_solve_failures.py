"""What goes wrong in practice: divergence, overflow, NaN, no solution, a start at the solution."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from phantom import Broyden, FixedPoint, Implicit, SolveError, SolveWarning, describe, fixed_point, report
from phantom.solve import solve
from tests.phantom.problems import DTYPE, linear_nonsymmetric
from tests.phantom.solvers import FEW_STEPS, SOLVERS, TOL, each

EXACT = 1e-8  # of the solution
ALONE = 1e-10  # between two batches: kernels differ in their last bits


@each(SOLVERS)
def test_no_fixed_point_is_not_convergence(solver):
    """z^2 + z + 1 = z has no real solution; the neighbour has one and must find it."""

    def f(z: Tensor) -> Tensor:
        return torch.stack((z[0] * z[0] + z[0] + 1, 0.5 * z[1] + 1))

    z, stats, _ = solve(f, torch.zeros(2, 3, dtype=DTYPE), solver)
    assert stats.converged.tolist() == [False, True]
    assert z.isfinite().all() and stats.residual.isfinite().all()
    torch.testing.assert_close(z[1], torch.full((3,), 2.0, dtype=DTYPE), rtol=0, atol=EXACT)


@pytest.mark.parametrize("stop", ["relative", "absolute"])
@pytest.mark.parametrize("tol", [TOL, None])
def test_growth_is_divergence(stop, tol):
    """f(z) = 3 z + 1 triples its residual each step; the relative one only tends to 2/3."""
    solver = FixedPoint(max_steps=40, tol=tol, stop=stop)
    z, stats, _ = solve(lambda z: 3 * z + 1, torch.zeros(1, 2, dtype=DTYPE), solver)
    assert stats.diverged.all() and not stats.converged.any() and z.isfinite().all()
    assert stats.num_steps.item() == math.ceil(math.log(1e6) / math.log(3))


@pytest.mark.parametrize("sync_every", [1, None])
def test_a_drift_is_no_progress(sync_every):
    """f(z) = z + c: |f(z) - z| is c but for the rounding of f(z), and relative to |f(z)| it falls in every step."""
    z0 = torch.full((2, 3), 0.1)
    z, stats, _ = solve(lambda z: z + 0.3, z0, FixedPoint(max_steps=40, tol=None, sync_every=sync_every))
    assert stats.trace[-1].max() < 0.1 * stats.trace[0].min()
    assert torch.equal(z, z0) and torch.equal(stats.residual, stats.trace[0])


def test_overflow_keeps_the_best_finite_iterate():
    """The first steps improve the residual, then the state overflows to infinity and NaN."""

    def f(z: Tensor) -> Tensor:
        return torch.where(z.abs() < 0.9, 0.5 * z + 0.49, torch.exp(1e4 * z))

    for tol in (TOL, None):
        z, stats, _ = solve(f, torch.zeros(1, 2, dtype=DTYPE), FixedPoint(max_steps=30, tol=tol))
        assert z.isfinite().all() and z.min() > 0.5 and not stats.converged.any() and stats.diverged.all()
        assert stats.residual.item() == stats.trace[stats.trace.isfinite()].min().item() < 0.2


@pytest.mark.parametrize("tol", [TOL, None])
@each(FEW_STEPS)
def test_nan_in_one_problem_stays_there(solver, tol):
    problem = linear_nonsymmetric()
    solver = type(solver)(**{**vars(solver), "tol": tol})

    def f(z: Tensor) -> Tensor:  # problem 1 leaves the domain of the square root after its first step
        fz = problem.f(z)
        return torch.cat((fz[:1], torch.sqrt(0.5 - z[1:2]), fz[2:]))

    clean, clean_stats, _ = solve(problem.f, problem.z0, solver)
    z, stats, _ = solve(f, problem.z0, solver)
    others = [0, 2]
    torch.testing.assert_close(z[others], clean[others], rtol=0, atol=ALONE)
    torch.testing.assert_close(stats.trace[:, others], clean_stats.trace[:, others], rtol=1e-9, atol=1e-12)
    assert torch.equal(stats.num_steps[others], clean_stats.num_steps[others])
    assert z.isfinite().all() and stats.diverged.tolist() == [False, True, False] and not stats.converged[1]


@each(FEW_STEPS)
def test_nan_from_the_start_returns_the_guess(solver):
    z0 = torch.ones(2, 3, dtype=DTYPE)
    z, stats, _ = solve(lambda z: z * torch.tensor([[torch.nan], [0.5]]) + 2, z0, solver)
    assert torch.equal(z[0], z0[0]) and stats.diverged.tolist() == [True, False]
    assert stats.residual[0] == torch.inf and stats.residual[1] < 1


@each(SOLVERS)
def test_a_zero_image_is_not_divergence(solver):
    """f(z0) = 0 makes the first relative residual infinite, though the next step leads on."""
    x = torch.tensor([[1.0, 2.0]])
    z, stats, _ = solve(
        lambda z: torch.relu(x - 0.5 * z), torch.full((1, 2), 100.0), type(solver)(max_steps=60, tol=1e-5)
    )
    assert stats.converged.all() and not stats.diverged.any()
    torch.testing.assert_close(z, x / 1.5, rtol=1e-4, atol=0)


@each(FEW_STEPS)
def test_starting_at_the_solution(solver):
    problem = linear_nonsymmetric()
    z, stats, _ = solve(lambda z: torch.tanh(z), torch.zeros(2, 4, dtype=DTYPE), solver)
    assert torch.equal(z, torch.zeros_like(z)) and not stats.diverged.any() and (stats.residual == 0).all()
    stopping = type(solver)(**{**vars(solver), "tol": TOL})
    z, stats, _ = solve(problem.f, problem.z_star, stopping)
    assert torch.equal(z, problem.z_star) and stats.num_steps.tolist() == [0] * 3 and stats.num_evals == 1


@each(FEW_STEPS)
def test_going_on_after_exact_convergence_stays_finite(solver):
    """A fixed budget does not stop: steps of length zero, 0/0 in every secant formula, must not hurt."""
    solver = type(solver)(**{**vars(solver), "max_steps": 30})
    z, stats, _ = solve(lambda z: 0.5 * z + 1, torch.zeros(2, 1, dtype=DTYPE), solver)
    assert stats.trace.isfinite().all() and not stats.diverged.any()
    torch.testing.assert_close(z, torch.full_like(z, 2.0), rtol=0, atol=1e-8)


def test_a_map_without_a_finite_value_at_the_start_is_said(monkeypatch):
    monkeypatch.setattr(report, "_said", set())
    with torch.no_grad(), pytest.warns(SolveWarning, match="0 of 2 problems converged"):
        fixed_point(lambda z: z * torch.nan, torch.zeros(2, 3, dtype=DTYPE))
    monkeypatch.setattr(report, "_said", set())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed_point(lambda z: z, torch.zeros(2, 3, dtype=DTYPE))  # solved by its start


def test_a_cotangent_that_is_not_finite_is_no_failure_of_the_solve(monkeypatch):
    monkeypatch.setattr(report, "_said", set())
    x = torch.zeros(2, 3, dtype=DTYPE, requires_grad=True)
    value = fixed_point(lambda z: 0.5 * z + x, torch.zeros(2, 3, dtype=DTYPE), grad=Implicit()).value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (value * torch.inf).sum().backward()


def adjoint_of(factor: Tensor, grad: Implicit, on_failure) -> None:
    """Differentiate z = 0.9 z + x with the cotangents `factor` (B,)."""
    z0 = torch.zeros(len(factor), 3, dtype=DTYPE)
    x = z0.clone().requires_grad_()
    solver = Broyden(max_steps=40, tol=1e-12)
    solution = fixed_point(lambda z: 0.9 * z + x, z0, solver=solver, grad=grad, on_failure=on_failure)
    (solution.value * factor[:, None]).sum().backward()


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_a_cotangent_that_is_not_finite_is_none_of_a_problem_that_failed(on_failure):
    """Of several problems, too: an overflow is the step that a gradient scaler means to skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adjoint_of(torch.tensor([1.0, torch.inf, torch.nan], dtype=DTYPE), Implicit(), on_failure)
    short = Implicit(solver=FixedPoint(max_steps=2, tol=1e-6))
    with pytest.raises((SolveError, SolveWarning), match="0 of 2 problems converged"), warnings.catch_warnings():
        warnings.simplefilter("error")
        adjoint_of(torch.tensor([1.0, torch.inf], dtype=DTYPE), short, on_failure)


def test_a_random_map_is_told_from_problems_that_depend_on_each_other():
    z = torch.zeros(1, 3)
    stats = fixed_point(lambda z: 0.5 * z + 1, z, solver=FixedPoint(max_steps=3, tol=1e-9), on_failure="ignore").stats
    stats.dependent = torch.tensor(True)
    assert "f gave another value than before: it draws random numbers" in describe(stats)
    stats.residual = stats.residual.expand(2)
    told = describe(stats)
    assert "they are one problem" in told and "z0[None]" in told and "; or f draws random numbers" in told


def test_the_policy_is_that_of_the_second_derivative_too():
    """The adjoint of the adjoint equation is another solve, and may fail alone."""
    seen = []
    x = torch.randn(2, 4, dtype=DTYPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = 3 * torch.linalg.qr(torch.randn(4, 4, dtype=DTYPE, generator=torch.Generator().manual_seed(1)))[0]
    solution = fixed_point(
        lambda z: z @ weight + x * x,
        torch.zeros_like(x),
        solver=Broyden(max_steps=30, tol=1e-10),
        grad=Implicit(solver=FixedPoint(max_steps=3, tol=1e-9)),
        on_failure=seen.append,
    )
    (g,) = torch.autograd.grad(solution.value.square().sum(), x, create_graph=True)
    assert len(seen) == 1
    torch.autograd.grad(g.sum(), x)
    assert len(seen) == 3, "the adjoint of the second cotangent, and the adjoint of the adjoint"
