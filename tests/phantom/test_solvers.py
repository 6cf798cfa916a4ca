"""Every solver on problems with a known solution, and what the loop promises about stopping and counting."""

import math

import pytest
import torch
from torch import Tensor

from phantom import NPG, UPG, Anderson, Broyden, FixedPoint, fixed_point
from phantom.solve import solve
from tests.phantom.problems import DTYPE, SOLVABLE, linear_nonsymmetric, stiff, tanh_contraction
from tests.phantom.solvers import FEW_STEPS, SOLVERS, TOL, Recorded, each

EXACT = 1e-8  # of the solution: TOL times the conditioning of the stiffest problem
ALONE = 1e-10  # between a problem solved alone and in a batch: kernels differ in their last bits


@pytest.mark.parametrize("make", SOLVABLE, ids=lambda make: make.__name__)
@each(SOLVERS)
def test_reaches_the_exact_solution(solver, make):
    problem = make()
    f = Recorded(problem.f)
    z, stats, _ = solve(f, problem.z0, solver)
    torch.testing.assert_close(z, problem.z_star, rtol=0, atol=EXACT)
    assert stats.converged.all() and not stats.diverged.any()
    assert (stats.residual < TOL).all()
    assert stats.num_evals == len(f.calls) == int(stats.num_steps.max()) + 1 == len(stats.trace)


@pytest.mark.parametrize("stop", ["relative", "absolute"])
@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
@each(FEW_STEPS)
def test_residuals_are_those_of_the_iterates(solver, stop, norm):
    problem = tanh_contraction()
    f = Recorded(problem.f)
    solver = type(solver)(**{**vars(solver), "stop": stop, "norm": norm})
    z, stats, _ = solve(f, problem.z0, solver)

    def measure(v: Tensor) -> list[float]:
        rows = v.tolist()
        if norm == "max":
            return [max(abs(entry) for entry in row) for row in rows]
        return [math.hypot(*row) / (len(row) ** 0.5 if norm == "rms" else 1) for row in rows]

    for expected_z, row in zip(f.calls, stats.trace, strict=True):
        fz = problem.f(expected_z)
        expected = torch.tensor(measure(fz - expected_z), dtype=DTYPE)
        if stop == "relative":
            first = torch.tensor(measure(problem.f(problem.z0)), dtype=DTYPE)
            expected = expected / torch.maximum(torch.tensor(measure(fz), dtype=DTYPE), first)
        torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-15)
    # the value is the iterate of the smallest residual
    best = stats.trace.argmin(dim=0)
    torch.testing.assert_close(stats.residual, stats.trace.amin(dim=0), rtol=0, atol=0)
    torch.testing.assert_close(z, torch.stack(f.calls)[best, range(len(z))], rtol=0, atol=0)


@each(SOLVERS)
@pytest.mark.parametrize("make", [linear_nonsymmetric, tanh_contraction, stiff], ids=lambda make: make.__name__)
def test_a_problem_does_not_depend_on_its_neighbours(solver, make):
    """Bit for bit, in a batch of the same size; alone, other BLAS kernels round differently, which solves amplify."""
    problem = make()
    rows = list(range(len(problem.z0)))
    together, stats, _ = solve(problem.f, problem.z0, solver)
    assert len(set(stats.num_steps.tolist())) > 1, "the problems must differ in difficulty for this test to mean much"
    for i in rows:
        copies, own, _ = solve(problem.bind([i] * len(rows)), problem.z0[[i] * len(rows)], solver)
        steps = stats.num_steps[i].item()
        assert own.num_steps[i].item() == steps
        assert torch.equal(copies[i], together[i]) and torch.equal(own.residual[i], stats.residual[i])
        assert torch.equal(own.trace[: steps + 1, i], stats.trace[: steps + 1, i])
        alone, own, _ = solve(problem.bind([i]), problem.z0[[i]], solver)
        assert abs(own.num_steps.item() - steps) <= 1 and own.converged.item()
        torch.testing.assert_close(alone, together[[i]], rtol=0, atol=ALONE)


@each(SOLVERS)
def test_a_converged_problem_stops_changing(solver):
    problem = linear_nonsymmetric()
    f = Recorded(problem.f)
    z, stats, _ = solve(f, problem.z0, solver)
    for i, steps in enumerate(stats.num_steps.tolist()):
        seen = torch.stack(f.calls)[steps:, i]
        assert (seen == z[i]).all(), "a problem moved after it had converged"
    assert stats.num_steps.min() < stats.num_steps.max()


@each(SOLVERS)
@pytest.mark.parametrize("sync_every", [1, 4, 50])
def test_sync_every_costs_evaluations_but_changes_nothing(solver, sync_every):
    problem = linear_nonsymmetric()
    z, stats, _ = solve(problem.f, problem.z0, solver)
    rare = type(solver)(**{**vars(solver), "sync_every": sync_every})
    z_rare, stats_rare, _ = solve(problem.f, problem.z0, rare)
    assert torch.equal(z, z_rare) and torch.equal(stats.num_steps, stats_rare.num_steps)
    assert 0 <= stats_rare.num_evals - stats.num_evals < sync_every


@pytest.mark.parametrize("solver_class", [FixedPoint, Anderson, Broyden])
@pytest.mark.parametrize("max_steps", [0, 1, 2])
def test_the_first_steps_by_hand(solver_class, max_steps):
    problem = tanh_contraction()
    f = Recorded(problem.f)
    solver = solver_class(max_steps=max_steps, tol=None, **({"ridge": 0.0} if solver_class is Anderson else {}))
    z, stats, _ = solve(f, problem.z0, solver)
    assert stats.num_evals == len(f.calls) == (max_steps + 1 if max_steps else 0)
    assert stats.num_steps.tolist() == [max_steps] * 3
    assert len(stats.trace) == len(f.calls)
    if max_steps == 0:
        assert torch.equal(z, problem.z0) and stats.residual.isnan().all() and not stats.converged.any()
        return
    z0, g0 = problem.z0, problem.f(problem.z0) - problem.z0
    z1 = z0 + g0
    torch.testing.assert_close(f.calls[1], z1, rtol=0, atol=1e-15)
    if max_steps == 2:
        g1 = problem.f(z1) - z1
        difference = g1 - g0
        if solver_class is FixedPoint:
            expected = z1 + g1
        elif solver_class is Anderson:  # alpha of z1 minimises |g1 - (1 - alpha) (g1 - g0)|
            rest = (g1 * difference).sum(1, keepdim=True) / difference.square().sum(1, keepdim=True)
            expected = (1 - rest) * (z1 + g1) + rest * (z0 + g0)
        else:  # one rank-one correction of J^{-1} = -I
            s = z1 - z0
            expected = z1 + g1 / (1 - (s * g1).sum(1, keepdim=True) / s.square().sum(1, keepdim=True))
        torch.testing.assert_close(f.calls[2], expected, rtol=1e-12, atol=1e-14)


def test_evaluations_of_attach_are_counted():
    problem = linear_nonsymmetric()
    for grad, more in ((UPG(k=5, lam=0.5), 5), (NPG(k=5, lam=0.5), 1)):
        f = Recorded(problem.f)
        solution = fixed_point(f, problem.z0, solver=Broyden(max_steps=9, tol=None), grad=grad)
        assert solution.stats.num_evals == len(f.calls) == 10 + more
        with torch.no_grad():
            f = Recorded(problem.f)
            solution = fixed_point(f, problem.z0, solver=Broyden(max_steps=9, tol=None), grad=grad)
        assert solution.stats.num_evals == len(f.calls) == 10


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FixedPoint(max_steps=-1, tol=None), "max_steps=-1"),
        (lambda: FixedPoint(max_steps=2.0, tol=None), "max_steps=2.0"),
        (lambda: FixedPoint(max_steps=True, tol=None), "max_steps=True"),
        (lambda: FixedPoint(max_steps=5, tol=-1.0), "tol=-1.0"),
        (lambda: FixedPoint(max_steps=5, tol="1e-3"), "tol='1e-3'"),
        (lambda: FixedPoint(max_steps=5, tol=torch.nan), "tol=nan"),
        (lambda: FixedPoint(max_steps=5, tol=None, lam=1.5), "lam=1.5"),
        (lambda: FixedPoint(max_steps=5, tol=None, lam=0), "lam=0"),
        (lambda: FixedPoint(max_steps=5, tol=None, stop="rel"), "relative, absolute"),
        (lambda: FixedPoint(max_steps=5, tol=None, norm="l1"), "l2, rms, max"),
        (lambda: FixedPoint(max_steps=5, tol=None, sync_every=0), "sync_every=0"),
        (lambda: Anderson(max_steps=5, tol=None, memory=0), "memory=0"),
        (lambda: Anderson(max_steps=5, tol=None, ridge=-1e-9), "ridge=-1e-09"),
        (lambda: Anderson(max_steps=5, tol=None, ridge="0"), "ridge='0'"),
        (lambda: Broyden(max_steps=5, tol=None, memory=0), "memory=0"),
    ],
)
def test_impossible_settings_name_themselves(make, name):
    with pytest.raises(ValueError) as error:
        make()
    assert name in str(error.value)


def test_settings_are_keyword_only_known_and_frozen():
    with pytest.raises(TypeError):
        FixedPoint(5, None)
    with pytest.raises(TypeError):
        FixedPoint(max_steps=5, tol=None, stop_mode="rel")
    with pytest.raises(AttributeError):
        FixedPoint(max_steps=5, tol=None).tol = 1.0


@each(FEW_STEPS | {"to_tolerance": FixedPoint(max_steps=7, tol=1e-30)})
def test_f_may_reuse_what_it_returns(solver):
    """The memory of an output belongs to f: the solve neither keeps it nor writes to it."""
    problem = tanh_contraction()
    expected, stats, _ = solve(problem.f, problem.z0, solver)
    output = torch.empty_like(problem.z0)
    z, others, _ = solve(lambda z: output.copy_(problem.f(z)), problem.z0, solver)
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    torch.testing.assert_close(others.trace, stats.trace, rtol=0, atol=0)
    constant = torch.arange(6.0).reshape(2, 3)
    solve(lambda z: constant, torch.zeros(2, 3), solver)
    assert torch.equal(constant, torch.arange(6.0).reshape(2, 3))
