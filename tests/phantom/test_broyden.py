"""Broyden against the textbook in two forms, its guard, and its ring of limited memory."""

import itertools

import pytest
import torch
from torch import Tensor

from phantom import Broyden
from phantom.solve import solve
from tests.phantom.problems import (
    DTYPE,
    Problem,
    collapse,
    linear_nonsymmetric,
    plateau,
    rotations,
    tanh_contraction,
)
from tests.phantom.solvers import TOL, Recorded

EXACT = 1e-8  # of the solution


def textbook_dense(problem: Problem, i: int, steps: int) -> Tensor:
    """Good Broyden on g(z) = f(z) - z with a dense Jacobian that starts at -I; return the iterates."""
    f, z = problem.bind([i]), problem.z0[[i]].clone()
    jacobian = -torch.eye(z.shape[1], dtype=DTYPE)
    g, iterates = (f(z) - z)[0], [z]
    for _ in range(steps):
        s = torch.linalg.solve(jacobian, -g)
        z = z + s
        new = (f(z) - z)[0]
        jacobian = jacobian + torch.outer(new - g - jacobian @ s, s) / s.dot(s)
        g = new
        iterates.append(z)
    return torch.cat(iterates)


def textbook_low_rank(problem: Problem, i: int, steps: int) -> Tensor:
    """The same with the inverse Jacobian -I + U V^T of rank-one terms, by Sherman and Morrison."""
    f, z = problem.bind([i]), problem.z0[[i]].clone()
    us, vs = [], []

    def inverse(v: Tensor) -> Tensor:
        return -v + sum(u * b.dot(v) for u, b in zip(us, vs, strict=True))

    def inverse_transposed(v: Tensor) -> Tensor:
        return -v + sum(b * u.dot(v) for u, b in zip(us, vs, strict=True))

    g, iterates = (f(z) - z)[0], [z]
    s = -inverse(g)
    for _ in range(steps):
        z = z + s
        iterates.append(z)
        new = (f(z) - z)[0]
        change = new - g
        b = inverse_transposed(s)
        us.append((s - inverse(change)) / b.dot(change))
        vs.append(b)
        g, s = new, -inverse(new)
    return torch.cat(iterates)


@pytest.mark.parametrize("textbook", [textbook_dense, textbook_low_rank])
@pytest.mark.parametrize("make", [linear_nonsymmetric, tanh_contraction, rotations], ids=lambda make: make.__name__)
def test_broyden_is_the_textbook(make, textbook):
    problem = make()
    steps = 6 if make is rotations else 14
    f = Recorded(problem.f)
    solve(f, problem.z0, Broyden(max_steps=steps, tol=None))
    ours = torch.stack(f.calls)
    for i in range(len(problem.z0)):
        theirs = textbook(problem, i, steps)
        # rounding is amplified once a problem has converged: compare while it moves
        moving = int((theirs.diff(dim=0).norm(dim=1) > 1e-7).sum())
        assert moving >= 5
        torch.testing.assert_close(ours[:moving, i], theirs[:moving], rtol=1e-8, atol=1e-9)


def test_broyden_guard_survives_a_singular_secant():
    """On the plateau 1 - c is zero: the textbook divides by it, the guard takes the plain step."""
    problem = plateau()
    z, stats, _ = solve(problem.f, problem.z0, Broyden(max_steps=20, tol=TOL))
    torch.testing.assert_close(z, problem.z_star, rtol=0, atol=EXACT)
    assert stats.converged.all() and stats.num_steps.max() <= 8
    with pytest.raises(torch.linalg.LinAlgError):  # its Jacobian becomes exactly singular
        textbook_dense(problem, 0, 3)


def test_broyden_guard_survives_a_collapsing_step():
    problem = collapse()
    z, stats, _ = solve(problem.f, problem.z0, Broyden(max_steps=10, tol=TOL))
    assert torch.equal(z, problem.z_star) and stats.converged.all() and stats.num_steps.max() <= 3
    assert textbook_dense(problem, 0, 2).abs().max() < 1e-3, "the textbook must stall here, or this tests nothing"


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 8])
def test_broyden_ring_converges_beyond_its_memory(memory):
    problem = tanh_contraction()
    z, stats, history = solve(problem.f, problem.z0, Broyden(max_steps=200, tol=TOL, memory=memory))
    torch.testing.assert_close(z, problem.z_star, rtol=0, atol=EXACT)
    assert stats.num_steps.max() > memory + 2 and history.count > memory, "the ring must have wrapped"
    assert history.steps.shape == (memory, *problem.z0.shape)


@pytest.mark.parametrize("memory", [1, 2, 4])
def test_broyden_ring_keeps_the_true_products(memory):
    """After wrapping, the stored Gram matrix is that of the stored steps, position by position."""
    problem = tanh_contraction()
    f = Recorded(problem.f)
    _, _, history = solve(f, problem.z0, Broyden(max_steps=11, tol=None, memory=memory))
    steps = torch.stack(f.calls).diff(dim=0)
    for age in range(memory):
        index = len(steps) - 1 - age
        torch.testing.assert_close(history.steps[index % memory], steps[index], rtol=0, atol=1e-12)
    gram = torch.einsum("nbd,mbd->bnm", history.steps, history.steps)
    torch.testing.assert_close(history.gram, gram, rtol=1e-6, atol=1e-14)


def test_broyden_ring_is_the_product_of_its_last_factors():
    """H g with the factors (I + s_{j+1} s_j^T / |s_j|^2) of the stored steps only, applied oldest first."""
    problem, memory = tanh_contraction(), 3
    f = Recorded(problem.f)
    solve(f, problem.z0, Broyden(max_steps=9, tol=None, memory=memory))
    z = torch.stack(f.calls)[:, 1]
    steps = z.diff(dim=0)
    for n in range(1, 9):
        stored = steps[max(0, n - memory) : n]
        w = problem.f(f.calls[n])[1] - z[n]
        for old, new in itertools.pairwise(stored):
            w = w + new * old.dot(w) / old.dot(old)
        last = stored[-1]
        torch.testing.assert_close(steps[n], w / (1 - last.dot(w) / last.dot(last)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("max_steps", [20, 200, 5000])
def test_memory_and_small_matrices_follow_the_steps_taken(max_steps):
    """A solve that stops after a few steps is the same at any budget, and holds no room for others."""
    problem = tanh_contraction()
    z, stats, history = solve(problem.f, problem.z0, Broyden(max_steps=max_steps, tol=1e-6))
    assert stats.converged.all() and history.count <= 16
    assert len(history.steps) <= 32 and history.gram.shape[1] <= 32
    expected, own, _ = solve(problem.f, problem.z0, Broyden(max_steps=16, tol=1e-6))
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(own.num_steps, stats.num_steps)


def test_room_grows_without_changing_the_steps():
    """Beyond the first room, and beyond a ring that is larger than it: still the textbook's products."""
    problem = tanh_contraction()
    for memory in (None, 40):
        f = Recorded(lambda z: problem.f(z) + 1e-3 * torch.sin(50 * z))  # never at rest
        _, _, history = solve(f, problem.z0, Broyden(max_steps=75, tol=None, memory=memory))
        kept = memory or 75
        assert history.steps.shape[0] == kept
        steps = torch.stack(f.calls).diff(dim=0)
        gram = torch.einsum("nbd,mbd->bnm", history.steps, history.steps)
        torch.testing.assert_close(history.gram, gram, rtol=1e-6, atol=1e-10)
        for age in range(kept):
            index = 74 - age
            torch.testing.assert_close(history.steps[index % kept], steps[index], rtol=0, atol=1e-9)
