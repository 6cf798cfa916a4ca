"""Means of what solves report: per problem, however the problems were cut into batches."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phantom import DEQ, FixedPoint, Implicit, Solution, SolveError, fixed_point
from phantom.engine.measure.solves import SolveMeter
from phantom.solution import Stats
from tests.phantom.problems import DTYPE, TanhMap, randn


def solution(
    residual: list[float],
    *,
    evals: int = 3,
    vjps: int = 2,
    adjoint: list[float] | None = None,
    penalty: float | None = None,
) -> Solution:
    """Return a solution with given numbers; a residual above one did not converge."""
    values = torch.tensor(residual, dtype=DTYPE)
    z = torch.zeros(len(residual), 1)

    def stats(residual: torch.Tensor, below: Stats | None) -> Stats:
        return Stats(
            num_steps=torch.arange(len(residual)),
            num_evals=evals,
            residual=residual,
            converged=residual < 1,
            diverged=residual > 100,
            stalled=residual > 1000,
            dependent=torch.tensor(False),
            trace=residual[None],
            num_vjps=vjps,
            adjoint=below,
        )

    below = None if adjoint is None else stats(torch.tensor(adjoint, dtype=DTYPE), None)
    value = None if penalty is None else torch.tensor(penalty)
    return Solution(value=z, z0=z, z_star=z, stats=stats(values, below), penalty=value)


def report(*batches: list[Solution]) -> dict[str, float]:
    meter = SolveMeter()
    for batch in batches:
        meter.add(batch)
    return meter.report()


def test_means_per_batch_and_per_problem():
    """Two batches of three and one problems: each problem weighs the same."""
    found = report([solution([0.1, 0.2, 200.0], evals=5, vjps=0)], [solution([2.0], evals=8, vjps=3)])
    assert found == {
        "num_evals": 6.5,
        "num_vjps": 1.5,
        "residual": pytest.approx((0.1 + 0.2 + 200.0 + 2.0) / 4),
        "num_steps": (0 + 1 + 2 + 0) / 4,
        "converged": 0.5,
        "diverged": 0.25,
    }


def test_the_backward_solve_is_a_mean_over_problems_too():
    found = report([solution([0.0, 0.0, 0.0], adjoint=[0.1, 0.2, 0.3])], [solution([0.0], adjoint=[1.0])])
    assert found["adjoint_residual"] == pytest.approx((0.1 + 0.2 + 0.3 + 1.0) / 4)


def test_the_penalty_is_a_mean_over_the_penalised_problems():
    """Each batch reports the mean of its own; steps without a penalty do not count."""
    batches = [solution([0.0, 0.0, 0.0], penalty=2.0)], [solution([0.0])], [solution([0.0], penalty=6.0)]
    assert report(*batches)["penalty"] == pytest.approx((3 * 2.0 + 6.0) / 4)


def test_several_solves_of_a_batch_are_also_reported_apart():
    found = report([solution([0.1, 0.3], evals=2), solution([3.0, 5.0], evals=7)], [solution([0.5]), solution([6.0])])
    assert found["num_evals"] == (2 + 7 + 3 + 3) / 2  # summed over the solves of a batch
    assert found["residual/0"] == pytest.approx(0.9 / 3) and found["residual/1"] == pytest.approx(14 / 3)
    assert found["residual"] == pytest.approx(14.9 / 6)
    assert (found["converged/0"], found["converged/1"], found["converged"]) == (1.0, 0.0, 0.5)


def test_nothing_added_and_nothing_solved():
    assert report() == {}
    assert report([], []) == {}


@pytest.mark.parametrize("sizes", [[12], [6, 6], [5, 5, 2], [1] * 12])
def test_real_solves_in_any_batches(sizes):
    """Statistics of a problem do not depend on its neighbours, and so neither do the means."""
    cell, inputs = TanhMap(4, radius=0.6), randn(12, 4, seed=5)
    solver = FixedPoint(max_steps=80, tol=1e-8)
    layer = DEQ(solver=solver, grad=Implicit(solver=solver))

    def solved(batch: torch.Tensor) -> list[Solution]:
        result = layer(cell.bind(batch), torch.zeros_like(batch))
        result.value.sum().backward()
        return [result]

    whole = report(solved(inputs))
    found = report(*(solved(batch) for batch in inputs.split(sizes)))
    assert whole["num_steps"] > 5 and 0 < whole["adjoint_residual"] < 1e-8
    for name in ("residual", "num_steps", "converged", "diverged", "adjoint_residual"):
        assert found[name] == pytest.approx(whole[name], rel=1e-6), name


def unread(f, z0: torch.Tensor, *, policy: str, backward: bool = True) -> Solution:
    """Return a solution by fixed budgets, and its backward, that nobody has looked at: as on a GPU."""
    grad = Implicit(solver=FixedPoint(max_steps=20, tol=None))
    with UnreadNumbers():
        found = fixed_point(f, z0, solver=FixedPoint(max_steps=20, tol=None), grad=grad, on_failure=policy)
        if backward:
            found.value.sum().backward()
    return found


class UnreadNumbers(TorchDispatchMode):
    """Let operators pass; a solve inside does not read what it computes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_row_notices_a_backward_that_diverged_once():
    """f = 3 z - 2 b at its own solution b: the forward stays there, u = 3 u + g grows, and is u = g instead."""
    b = torch.ones(4, 3, dtype=DTYPE, requires_grad=True)  # f(b) = b without a rounding
    meter = SolveMeter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = unread(lambda z: 3 * z - 2 * b, b.detach(), policy="warn")
            assert found.stats.adjoint.fallback.all() and not caught
        meter.add([found])
        meter.report()
        meter.report()
    assert len(caught) == 1 and "adjoint solve" in str(caught[0].message) and "4 diverged" in str(caught[0].message)


def test_a_row_follows_the_policy_of_the_solve():
    b = randn(4, 3, seed=1).requires_grad_()
    for policy, fails in (("raise", True), ("ignore", False)):
        meter = SolveMeter()
        meter.add([unread(lambda z: 3 * z + b, torch.zeros(4, 3, dtype=DTYPE), policy=policy, backward=False)])
        with pytest.raises(SolveError, match="the solve of z = f") if fails else nullcontext():
            meter.report()
