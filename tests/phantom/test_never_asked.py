"""`sync_every=None`: a solve to a tolerance whose host is told nothing ends where one that asks at every step ends."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from phantom import NPG, UPG, Anderson, Broyden, FixedPoint, Implicit, SolveError, fixed_point
from phantom.report import act_where_nobody_did
from phantom.solve import solve
from tests.phantom.problems import DTYPE, randn, with_radius
from tests.phantom.solvers import each
from tests.phantom.syncs import Lists, Syncs

SOLVERS = {
    "plain": FixedPoint(max_steps=120, tol=1e-6),
    "anderson": Anderson(max_steps=60, tol=1e-6),
    "broyden": Broyden(max_steps=60, tol=1e-6),
    "broyden_ring": Broyden(max_steps=60, tol=1e-6, memory=4),
}
PER_PROBLEM = ("num_steps", "residual", "converged", "diverged", "stalled")


class Unlike:
    """Problems that converge fast and slowly, one that begins at its solution, one that grows, one that becomes NaN."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.jacobian = torch.stack(
            [with_radius(radius, 8, seed=i) for i, radius in enumerate((0.2, 0.8, 0.5, 3, 0.6))]
        )
        self.jacobian[3] = 3 * torch.eye(8)
        self.b = randn(5, 8, seed=7)
        self.b[2] = 0
        self.jacobian, self.b = self.jacobian.to(dtype), self.b.to(dtype)
        self.z0 = torch.zeros_like(self.b)

    def __call__(self, z: Tensor) -> Tensor:
        fz = torch.einsum("bij,bj->bi", self.jacobian[: len(z)], z) + self.b[: len(z)]
        return torch.cat((fz[:4], fz[4:] * (1 + (1.5 - fz[4:].abs().amax(1, keepdim=True)).sqrt())))


def both(f, z0: Tensor, solver, **settings):
    """Return what a solve gives that asks at every step, and one that never does, on the same kernels.

    A dispatch mode keeps the loop from reading what lies on the host anyway.
    """
    found = []
    for sync_every in (1, None):
        with Syncs() as syncs, Lists() as lists:
            found.append(solve(f, z0, replace(solver, sync_every=sync_every), **settings)[:2])
        assert (syncs.waiting + lists.waiting == 0) == (sync_every is None)
    return found


def check_same(asked: tuple, never: tuple, max_steps: int) -> None:
    (z, stats), (z_never, own) = asked, never
    assert torch.equal(z, z_never)
    for name in PER_PROBLEM:
        assert torch.equal(getattr(own, name), getattr(stats, name)), name
    taken = len(stats.trace)
    torch.testing.assert_close(own.trace[:taken], stats.trace, rtol=0, atol=0, equal_nan=True)
    assert own.num_evals == len(own.trace) == max_steps + 1 and not own.dependent


@each(SOLVERS)
@pytest.mark.parametrize("stop", ["relative", "absolute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_problems_of_unlike_speed_end_where_they_would(solver, stop, dtype):
    solver, problems = replace(solver, stop=stop), Unlike(dtype)
    asked, never = both(problems, problems.z0, solver)
    check_same(asked, never, solver.max_steps)
    stats = asked[1]
    assert stats.converged[:3].all() and stats.num_steps[2] == 0 and stats.num_steps[0] < stats.num_steps[1]
    assert stats.diverged[4] or not stats.converged[4], "one of them must fail"
    plain = solve(problems, problems.z0, replace(solver, sync_every=None))
    torch.testing.assert_close(plain[0], never[0], rtol=1e-4, atol=1e-4)
    assert plain[1].num_evals == solver.max_steps + 1, "on a host that could look, too"
    assert torch.equal(plain[1].converged, never[1].converged) and torch.equal(plain[1].diverged, never[1].diverged)


@each(SOLVERS)
@pytest.mark.parametrize("stop", ["relative", "absolute"])
@pytest.mark.parametrize("tol", [0.0, 1e-9])
def test_a_problem_at_its_floor_stops_there(solver, stop, tol):
    solver, problems = replace(solver, stop=stop, tol=tol, max_steps=120), Unlike(torch.float32)
    asked, never = both(problems, problems.z0[:3], solver)
    check_same(asked, never, solver.max_steps)
    assert asked[1].stalled[:2].any() and asked[1].num_evals < solver.max_steps


@each(SOLVERS)
def test_the_adjoint_equation_and_watched_iterates(solver):
    problems, seen = Unlike(DTYPE), {1: [], None: []}
    g, jacobian = randn(3, 8, seed=8) * torch.tensor([[1.0], [1e-3], [0.0]]), problems.jacobian[:3].mT
    for sync_every, kept in seen.items():
        found = solve(
            lambda u: torch.einsum("bij,bj->bi", jacobian, u) + g,
            torch.zeros_like(g),
            replace(solver, sync_every=sync_every),
            fz0=g,
            scale=g.norm(dim=1),
            in_place=True,
            watch=lambda step, best, kept=kept: kept.append(best.clone()),
        )
        kept.append(found[0])
    taken = len(seen[1]) - 1
    assert taken < solver.max_steps == len(seen[None]) - 1
    exact = torch.linalg.solve(torch.eye(8, dtype=DTYPE) - jacobian, g)
    torch.testing.assert_close(seen[None][-1], exact, rtol=1e-4, atol=1e-5)
    for a, b in zip([*seen[1][:taken], seen[1][-1]], [*seen[None][:taken], seen[None][-1]], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


def test_the_last_iterate_of_a_held_problem_is_its_best_one():
    problems = Unlike(DTYPE)
    asked, never = both(problems, problems.z0[:3], SOLVERS["broyden"], last=True)
    check_same(asked, never, SOLVERS["broyden"].max_steps)


@pytest.mark.parametrize(
    "grad", [UPG(k=2, lam=0.5), NPG(k=3, lam=0.5), Implicit()], ids=lambda grad: type(grad).__name__
)
def test_forward_and_backward_never_wait(grad):
    weight, x = with_radius(0.5, 6, seed=1).requires_grad_(), randn(4, 6, seed=2)
    gradients = {}
    for sync_every in (1, None):
        solver = Broyden(max_steps=30, tol=1e-10, sync_every=sync_every)
        own = replace(grad, solver=solver) if isinstance(grad, Implicit) else grad
        with Syncs() as syncs, Lists() as lists:
            solution = fixed_point(
                lambda z: torch.tanh(z @ weight.mT + x), torch.zeros_like(x), solver=solver, grad=own
            )
            gradients[sync_every] = torch.autograd.grad(solution.value.square().sum(), weight)[0]
        assert (syncs.waiting + lists.waiting == 0) == (sync_every is None)
    assert solution.stats.converged.all() and not solution.stats.dependent and not solution.stats.acted
    torch.testing.assert_close(gradients[None], gradients[1], rtol=0, atol=1e-12)


def test_failures_are_told_where_the_caller_waits():
    solver = FixedPoint(max_steps=9, tol=1e-6, sync_every=None)
    with Syncs(), torch.no_grad():
        stats = fixed_point(lambda z: 3 * z + 1, torch.zeros(2, 3), solver=solver, on_failure="raise").stats
    with pytest.raises(SolveError):
        act_where_nobody_did(stats)


CHAIN = 0.9 * torch.diag(torch.ones(11, dtype=DTYPE), -1)
FIRST = torch.zeros(12, 1, dtype=DTYPE).index_fill(0, torch.tensor(0), 1.0)


@each(SOLVERS | {"rarely": replace(SOLVERS["plain"], sync_every=1000)})
@pytest.mark.parametrize("max_steps", [8, 200])
def test_a_held_problem_that_wakes_moves_again_and_is_called_dependent(solver, max_steps):
    """A chain: every node but the first begins at rest, and is moved by the one before it."""
    solver = replace(solver, max_steps=max_steps, sync_every=solver.sync_every if solver.sync_every > 1 else None)
    for place in (Syncs(), torch.no_grad()):  # as on a device, and on the host
        with place:
            z, stats, _ = solve(lambda z: CHAIN @ z + FIRST, torch.zeros_like(FIRST), solver)
        assert stats.dependent and not stats.diverged.any()
        exact = torch.linalg.solve(torch.eye(12, dtype=DTYPE) - CHAIN, FIRST)
        if max_steps == 8:
            assert not stats.converged.any(), "the end of the chain has not moved yet"
        elif isinstance(solver, FixedPoint):
            assert stats.converged.all()
            torch.testing.assert_close(z, exact, rtol=0, atol=1e-4)
        else:  # secants of a node that are due to others: it may fail, and then says so
            assert not stats.converged.any() or (z - exact).abs().max() < 1e-4


def test_a_stream_that_is_captured_is_never_asked(monkeypatch):
    problems, solver = Unlike(DTYPE), SOLVERS["anderson"]
    expected = solve(problems, problems.z0, replace(solver, sync_every=None))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with Syncs() as syncs, Lists() as lists:
        z, stats, _ = solve(problems, problems.z0, solver)
    assert syncs.waiting == lists.waiting == 0 and stats.num_evals == solver.max_steps + 1
    torch.testing.assert_close(z, expected[0], rtol=0, atol=1e-9)
