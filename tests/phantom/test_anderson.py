"""Anderson against a dense least-squares problem, its fallback, its ridge, and its ring."""

import pytest
import torch
from torch import Tensor

from phantom import Anderson, Broyden, FixedPoint
from phantom.solve import solve
from phantom.solver import anderson
from phantom.solver.anderson import Window
from tests.phantom.problems import DTYPE, affine, linear_nonsymmetric, randn, symmetric, tanh_contraction
from tests.phantom.solvers import Recorded


def test_anderson_minimises_the_mixed_residual():
    """With three iterates, alpha is the constrained least-squares solution by a dense solve of the bordered system."""
    problem = tanh_contraction()
    f = Recorded(problem.f)
    solve(f, problem.z0, Anderson(max_steps=3, tol=None, memory=3, ridge=0.0, lam=0.7))
    z = torch.stack(f.calls)
    g = torch.stack([problem.f(call) - call for call in f.calls])
    for i in range(3):
        gram = g[:3, i] @ g[:3, i].T
        bordered = torch.block_diag(gram, torch.zeros(1, 1, dtype=DTYPE))
        bordered[3, :3] = bordered[:3, 3] = 1
        alpha = torch.linalg.solve(bordered, torch.tensor([0.0, 0, 0, 1], dtype=DTYPE))[:3]
        expected = alpha @ (z[:3, i] + 0.7 * g[:3, i])
        torch.testing.assert_close(z[3, i], expected, rtol=1e-7, atol=1e-9)


def test_the_deq_code_counts_evaluations():
    """Anderson(max_steps=f_thres - 1) is the Anderson of locuslab/deq, written out here without its absolute ridge."""
    f_thres, memory = 8, 3
    problem = tanh_contraction()
    f = Recorded(problem.f)
    solve(f, problem.z0, Anderson(max_steps=f_thres - 1, tol=None, memory=memory, ridge=0.0))
    assert len(f.calls) == f_thres
    x = [problem.z0, problem.f(problem.z0)]
    for k in range(2, f_thres):
        window = torch.stack(x[-min(k, memory) :], dim=1)  # (B, n, D)
        images = torch.stack([problem.f(z) for z in window.unbind(1)], dim=1)
        g = images - window
        bordered = torch.ones(len(g), g.shape[1] + 1, g.shape[1] + 1, dtype=DTYPE)
        bordered[:, 0, 0], bordered[:, 1:, 1:] = 0, g @ g.mT
        right = torch.zeros_like(bordered[:, 0])
        right[:, 0] = 1
        alpha = torch.linalg.solve(bordered, right)[:, 1:]
        x.append((alpha[:, :, None] * images).sum(dim=1))
    torch.testing.assert_close(torch.stack(f.calls), torch.stack(x), rtol=1e-6, atol=1e-8)


def test_with_all_its_steps_it_is_gmres_on_an_affine_map():
    """z_{n+1} = z' + g', where z' minimises |f(z') - z'| over the Krylov space: here by a dense least squares."""
    matrix, c = randn(2, 12, 12, seed=3), randn(2, 12, seed=4)
    matrix = 2 * matrix / torch.linalg.eigvals(matrix).abs().amax(dim=1)[:, None, None]
    f = Recorded(lambda z: torch.einsum("bij,bj->bi", matrix, z) + c)
    solver = Anderson(max_steps=14, memory=14, tol=1e-8, ridge=1e-14)
    z, stats, _ = solve(f, torch.zeros_like(c), solver)
    for problem in range(2):
        a = torch.eye(12, dtype=DTYPE) - matrix[problem]
        krylov = [c[problem]]
        for n in range(1, 8):
            basis = torch.linalg.qr(torch.stack(krylov, dim=1))[0]
            best = basis @ torch.linalg.lstsq(a @ basis, c[problem, :, None]).solution[:, 0]
            torch.testing.assert_close(f.calls[n + 1][problem], best + c[problem] - a @ best, rtol=1e-6, atol=1e-7)
            krylov.append(a @ krylov[-1])
    dense = torch.linalg.solve(torch.eye(12, dtype=DTYPE) - matrix, c)
    torch.testing.assert_close(z, dense, rtol=1e-6, atol=1e-6)
    assert stats.converged.all() and int(stats.num_steps.max()) <= 13
    broyden = solve(f, torch.zeros_like(c), Broyden(max_steps=40, tol=1e-8))[1]
    assert int(broyden.num_steps.min()) > 20, "which takes up to two steps a dimension"


def test_anderson_falls_back_to_the_damped_step():
    """g is the same at every iterate of f(z) = z + v: the Gram matrix is singular, and no ridge mends it."""
    v = torch.tensor([[1.0] * 4, [-2.0] * 4], dtype=DTYPE)  # powers of two: singular without a rounding error
    f = Recorded(lambda z: z + v)
    solve(f, torch.zeros_like(v), Anderson(max_steps=4, tol=None, memory=3, ridge=0.0, lam=0.5))
    for n, call in enumerate(f.calls):
        torch.testing.assert_close(call, 0.5 * n * v, rtol=1e-12, atol=0)


def test_anderson_falls_back_for_the_singular_problem_alone():
    problem = linear_nonsymmetric()

    def f(z: Tensor) -> Tensor:
        return torch.cat((z[:1] + 1, problem.f(z)[1:]))

    calls, clean = Recorded(f), Recorded(problem.f)
    solver = Anderson(max_steps=6, tol=None, memory=3, ridge=0.0)
    solve(calls, problem.z0, solver)
    solve(clean, problem.z0, solver)
    torch.testing.assert_close(torch.stack(calls.calls)[:, 1:], torch.stack(clean.calls)[:, 1:], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(calls.calls[6][0], torch.full((12,), 6.0, dtype=DTYPE))


def test_anderson_ridge_is_relative():
    """Scaling a linear problem scales its iterates: an absolute ridge would change them as residuals shrink."""
    matrix, x = symmetric(torch.linspace(-0.9, 0.9, 40, dtype=DTYPE)[None], seed=5)[0], randn(1, 40, seed=6)
    results = []
    for scale in (1.0, 1e-8):
        f = Recorded(lambda z, scale=scale: z @ matrix + scale * x)
        solve(f, torch.zeros_like(x), Anderson(max_steps=25, tol=None))
        results.append(torch.cat(f.calls) / scale)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_anderson_keeps_its_rate_at_small_residuals():
    """The steps from 1e-6 to 1e-10 cost about as many as those from 1e-2 to 1e-6."""
    eigenvalues = torch.linspace(-0.9, 0.9, 100, dtype=DTYPE)[None]
    problem = affine("rho_0.9", symmetric(eigenvalues, seed=7), seed=8)

    def steps(solver_class, tol: float) -> int:
        _, stats, _ = solve(problem.f, problem.z0, solver_class(max_steps=500, tol=tol, stop="absolute"))
        assert stats.converged.all()
        return stats.num_steps.item()

    early, late = (steps(Anderson, b) - steps(Anderson, a) for a, b in ((1e-2, 1e-6), (1e-6, 1e-10)))
    assert late < 1.5 * early
    assert steps(Anderson, 1e-10) < 0.5 * steps(FixedPoint, 1e-10)


@pytest.mark.parametrize("memory", [1, 2, 4])
def test_anderson_ring_keeps_the_true_products(memory):
    problem = tanh_contraction()
    f = Recorded(problem.f)
    _, _, window = solve(f, problem.z0, Anderson(max_steps=7, tol=None, memory=memory))
    assert isinstance(window, Window)
    torch.testing.assert_close(window.gram, torch.einsum("nbd,mbd->bnm", window.g, window.g), rtol=1e-12, atol=1e-30)
    for age in range(memory):
        index = 6 - age  # seven proposals were made, from the iterates 0 to 6
        assert torch.equal(window.z[index % memory], f.calls[index])


def test_room_is_made_as_steps_are_taken(monkeypatch):
    """A long memory costs what the steps cost, and changes no number; 40 steps solve 40 unknowns, where f expands."""
    matrix, c = randn(2, 40, 40, seed=3), randn(2, 40, seed=4)
    matrix = 1.5 * matrix / torch.linalg.eigvals(matrix).abs().amax(dim=1)[:, None, None]
    solver, found, room = Anderson(max_steps=60, memory=60, tol=1e-8, ridge=1e-14), [], []
    assert len(solver.start(c, c).z) == 16
    for first in (16, 60):
        monkeypatch.setattr(anderson, "ROOM", first)
        z, stats, memory = solve(lambda z: torch.einsum("bij,bj->bi", matrix, z) + c, torch.zeros_like(c), solver)
        found.append((z, stats.trace))
        room.append(len(memory.z))
    assert room == [60, 60] and torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    dense = torch.linalg.solve(torch.eye(40, dtype=DTYPE) - matrix, c)
    torch.testing.assert_close(found[0][0], dense, rtol=1e-5, atol=1e-5)


def test_room_is_doubled_up_to_the_memory():
    solver, z, g = Anderson(max_steps=90, memory=40), randn(2, 3, seed=1), randn(2, 3, seed=2)
    memory, rooms = solver.start(z, g), []
    for _ in range(90):
        solver.propose(memory, z, g)
        rooms.append((len(memory.z), len(memory.g), memory.gram.shape[1]))
    assert rooms == [(16,) * 3] * 16 + [(32,) * 3] * 16 + [(40,) * 3] * 58
