"""SHINE against the product of Broyden's factors, written out, and against the exact adjoint."""

import itertools

import pytest
import torch

from phantom import NPG, SHINE, Anderson, Broyden, FixedPoint, fixed_point
from phantom.diagnostics import cosine
from phantom.solve import solve
from tests.phantom.cases import BATCH, DIM, Case, close
from tests.phantom.problems import DTYPE, randn
from tests.phantom.solvers import Recorded


@pytest.mark.parametrize("memory", [None, 3, 1])
@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_the_cotangent_is_the_transposed_product_of_factors(memory, steps):
    """u = (I + s_0 s_1^T / |s_0|^2) ... (I + s_{n-2} s_{n-1}^T / |s_{n-2}|^2) g over the stored steps."""
    case, solver = Case(), Broyden(max_steps=steps, tol=None, memory=memory)
    f = Recorded(case.map.bind(case.x))
    with torch.no_grad():
        solve(f, torch.zeros(BATCH, DIM, dtype=DTYPE), solver)
    moved = torch.stack(f.calls).diff(dim=0)[-(memory or steps) :]
    expected = case.cotangent.clone()
    for i in range(BATCH):
        for old, new in reversed(list(itertools.pairwise(moved[:, i]))):
            expected[i] = expected[i] + old * new.dot(expected[i]) / old.dot(old)
    z0 = torch.zeros(BATCH, DIM, dtype=DTYPE)
    solution = case.solve(SHINE(), solver=solver, z0=z0)
    (u,) = torch.autograd.grad(solution.value, case.x, case.cotangent)  # df/dx is the identity
    torch.testing.assert_close(u, expected, rtol=1e-8, atol=1e-10)
    assert solution.stats.num_vjps == 0 and solution.stats.num_evals == steps + 2


def test_it_is_exact_in_one_dimension():
    """One secant tells all of a linear map of one unknown: u = g / (1 - j)."""
    j, x = torch.tensor([[0.9], [-1.7], [0.3]], dtype=DTYPE), randn(3, 1, seed=1).requires_grad_()
    solver = Broyden(max_steps=2, tol=None)
    solution = fixed_point(lambda z: j * z + x, torch.zeros(3, 1, dtype=DTYPE), solver=solver, grad=SHINE())
    cotangent = randn(3, 1, seed=2)
    (u,) = torch.autograd.grad(solution.value, x, cotangent)
    torch.testing.assert_close(u, cotangent / (1 - j), rtol=1e-12, atol=0)


def test_it_is_no_worse_than_the_one_step_gradient_on_average():
    better = []
    for seed in range(6):
        case = Case(seed=seed)
        z0 = torch.zeros(BATCH, DIM, dtype=DTYPE)
        exact = case.carry(case.exact_adjoint())
        quality = [
            cosine(case.gradients(grad, solver=Broyden(max_steps=12, tol=None), z0=z0), exact)
            for grad in (SHINE(), NPG(k=1, lam=1.0))
        ]
        better.append(quality[0] - quality[1])
    assert torch.stack(better).mean() > 0


@pytest.mark.parametrize("solver", [Anderson(max_steps=5, tol=None), FixedPoint(max_steps=5, tol=None)], ids=str)
def test_other_solvers_are_refused(solver):
    with pytest.raises(TypeError, match="use it with solver=Broyden"):
        Case().solve(SHINE(), solver=solver)


def test_the_history_lives_until_backward_and_no_longer():
    case = Case()
    solution = case.solve(SHINE(), solver=Broyden(max_steps=6, tol=None))
    first = torch.autograd.grad(solution.value, case.leaves, case.cotangent, retain_graph=True)
    close(torch.autograd.grad(solution.value, case.leaves, case.cotangent), first, 0.0)
    assert case.solve(NPG(k=2, lam=0.5)).history is None


def test_a_start_that_meets_tol_has_the_gradient_of_one_step():
    case = Case()
    start = case.solve(NPG(k=1, lam=1.0), solver=Broyden(max_steps=60, tol=1e-12)).z_star
    solver = Broyden(max_steps=10, tol=1e-6)
    found = [
        torch.autograd.grad(case.solve(grad, solver=solver, z0=start).value, case.x, case.cotangent)[0]
        for grad in (SHINE(), NPG(k=1, lam=1.0))
    ]
    close(*found, tol=1e-12)


def test_problems_that_depend_on_each_other_leave_no_steps():
    coupled = torch.linalg.qr(randn(4, 4, seed=5))[0] * 0.95
    bias = torch.tensor([[1.0], [1e-3], [1e-6], [0.0]], dtype=DTYPE).requires_grad_()
    solver = Broyden(max_steps=40, tol=1e-4, stop="absolute")
    with pytest.raises(TypeError, match="problems that do not depend on each other"):
        fixed_point(lambda z: coupled @ z + bias, torch.zeros(4, 1, dtype=DTYPE), solver=solver, grad=SHINE())
