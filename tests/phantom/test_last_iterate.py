"""`returns="last"`: the iterate that was evaluated last, with its own residual, in the place of the best one."""

import pytest
import torch

from phantom import DEQ, UPG, Anderson, Broyden, FixedPoint, fixed_point
from tests.phantom.problems import DTYPE, randn

BATCH, DIM = 5, 8
START = torch.zeros(BATCH, DIM, dtype=DTYPE)
SOLVERS = {
    "plain": FixedPoint(max_steps=6, tol=None),
    "anderson": Anderson(max_steps=6, tol=None, memory=3),
    "broyden": Broyden(max_steps=6, tol=None),
}


def seen_by(f, **settings):
    """Return the solution, and the states at which f was evaluated without a graph."""
    states = []

    def recorded(z):
        if not torch.is_grad_enabled():
            states.append(z.clone())
        return f(z)

    with torch.no_grad():
        return fixed_point(recorded, START, confirm=False, **settings), states


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_it_is_the_state_evaluated_last(solver):
    f = lambda z: 2 * torch.cos(3 * z) + randn(BATCH, DIM, seed=1)  # noqa: E731  (residuals rise and fall)
    solution, states = seen_by(f, solver=solver, returns="last")
    best, _ = seen_by(f, solver=solver)
    assert torch.equal(solution.z_star, states[-1])
    size = torch.maximum(f(states[-1]).norm(dim=1), f(START).norm(dim=1))
    expected = (f(states[-1]) - states[-1]).norm(dim=1) / size
    torch.testing.assert_close(solution.stats.residual, expected, rtol=1e-12, atol=0)
    assert (best.stats.residual <= solution.stats.residual).all()
    assert not torch.equal(best.z_star, solution.z_star)


def test_an_expanding_map_is_followed():
    solution, _ = seen_by(lambda z: 1.5 * z + 1, solver=FixedPoint(max_steps=7, tol=None), returns="last")
    torch.testing.assert_close(solution.z_star, torch.full_like(START, sum(1.5**n for n in range(7))))


def test_a_problem_that_has_converged_stays():
    rates = torch.tensor([0.1, 0.5, 0.9, 0.99, 1.2], dtype=DTYPE)[:, None]
    f = lambda z: rates * z + 1  # noqa: E731
    solver = FixedPoint(max_steps=30, tol=1e-6)
    last, best = (seen_by(f, solver=solver, returns=which)[0] for which in ("last", "best"))
    assert last.stats.converged.tolist() == best.stats.converged.tolist() == [True, True, False, False, False]
    assert torch.equal(last.z_star[:4], best.z_star[:4])
    expected = (1.2**30 - 1) / 0.2
    torch.testing.assert_close(last.z_star[4], torch.full((DIM,), expected, dtype=DTYPE))
    assert torch.equal(best.z_star[4], START[4])


def test_the_gradient_is_attached_to_it():
    bias = torch.zeros(DIM, dtype=DTYPE, requires_grad=True)
    deq = DEQ(solver=FixedPoint(max_steps=4, tol=None), grad=UPG(k=2, lam=1.0), returns="last")
    solution = deq(lambda z: 1.5 * z + 1 + bias, START)
    solution.value.sum().backward()
    torch.testing.assert_close(solution.value, torch.full_like(START, sum(1.5**n for n in range(6))))
    torch.testing.assert_close(bias.grad, torch.full_like(bias, BATCH * 2.5))


def test_anything_else_is_refused():
    for make in (lambda **kept: DEQ(**kept), lambda **kept: fixed_point(torch.tanh, START, **kept)):
        with pytest.raises(ValueError, match="returns='final' is not known; choose one of best, last"):
            make(returns="final")


@pytest.mark.parametrize("tol", [1e-6, None])
def test_a_problem_that_has_diverged_stays_where_it_was_best_whatever_its_neighbours_do(tol):
    solver = FixedPoint(max_steps=40, tol=tol)
    rates = torch.tensor([[3.0], [0.999]], dtype=DTYPE)

    def last(rates):
        z0 = torch.zeros_like(rates)
        with torch.no_grad():
            return fixed_point(lambda z: rates * z + 1, z0, solver=solver, returns="last", on_failure="ignore")

    both = last(rates)
    for i in range(2):
        alone = last(rates[i : i + 1])
        assert torch.equal(alone.z_star[0], both.z_star[i]) and alone.stats.residual[0] == both.stats.residual[i]
    assert both.z_star[0] == 0 and both.z_star[1] > 38


@pytest.mark.parametrize("solver", [FixedPoint(max_steps=60, tol=1e-9), Broyden(max_steps=60, tol=1e-9)], ids=str)
def test_a_solve_that_converges_evaluates_f_as_often_as_for_the_best_iterate(solver):
    f = lambda z: 0.5 * z + torch.linspace(0.1, 1, DIM, dtype=DTYPE)  # noqa: E731
    with torch.no_grad():
        found = [fixed_point(f, START, solver=solver, returns=returns).stats for returns in ("best", "last")]
    assert found[0].num_evals == found[1].num_evals and bool(found[1].converged.all())


def test_a_state_of_last_and_best_iterates_is_measured_as_a_whole():
    """The second problem is solved for the first one's last iterate, which is not the one returned."""

    def f(z):
        return torch.stack([3 * z[0] + 1, 0.5 * z[1] + 0.1 * z[0].clamp(-5, 5)])

    solver = FixedPoint(max_steps=40, tol=None)
    with torch.no_grad():
        solution = fixed_point(f, torch.zeros(2, 1, dtype=DTYPE), solver=solver, returns="last", on_failure="ignore")
        expected = (f(solution.z_star) - solution.z_star).abs()[1, 0]
    assert solution.stats.residual[1] > 0.1 * expected > 0 and bool(solution.stats.dependent)
