"""Iterates of the solve with a gradient each, and the steps that an estimator unrolls."""

from contextlib import nullcontext

import pytest
import torch

from phantom import (
    BPTT,
    DEQ,
    NPG,
    SHINE,
    UPG,
    Anderson,
    Broyden,
    FixedPoint,
    Implicit,
    Rollout,
    SolveError,
    fixed_point,
)
from tests.phantom.cases import BATCH, DIM, Case, close
from tests.phantom.problems import DTYPE, randn, with_radius
from tests.phantom.solvers import Recorded

EXACT = 1e-12
START = torch.zeros(BATCH, DIM, dtype=DTYPE)
GRADS = {"upg": UPG(k=3), "npg": NPG(k=3), "implicit": Implicit(solver=Broyden(max_steps=60, tol=1e-13))}


def picard(f, steps: int, lam: float = 1.0) -> torch.Tensor:
    z = START
    with torch.no_grad():
        for _ in range(steps):
            z = lam * f(z) + (1 - lam) * z
    return z


@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("solver", [FixedPoint(max_steps=9, tol=None), Rollout(max_steps=9)], ids=["plain", "rollout"])
def test_states_are_iterates_with_the_gradient_of_the_estimator(solver, grad):
    """The residual falls in every step here, so that the best iterate is the last one."""
    case = Case(radius=0.5)
    f = case.map.bind(case.x)
    solution = fixed_point(f, START, solver=solver, grad=grad, states=(2, 5))
    for state, steps in zip((*solution.states, solution.value), (2, 5, 9), strict=True):
        z = picard(f, steps)
        if isinstance(grad, UPG):
            for _ in range(3):
                z = 0.5 * f(z) + 0.5 * z
            expected = torch.autograd.grad(z, case.leaves, case.cotangent)
        else:
            # J = diag(tanh') W at this iterate
            slope = 1 - torch.tanh(z @ case.map.weight.T + case.map.bias).square()
            jacobian = (slope[:, :, None] * case.map.weight).detach()
            eye = torch.eye(DIM, dtype=DTYPE)
            if isinstance(grad, NPG):
                damped = 0.5 * (jacobian + eye)
                powers = eye + damped.mT + damped.mT @ damped.mT
                u = (0.5 * powers @ case.cotangent[:, :, None])[:, :, 0]
            else:
                u = torch.linalg.solve(eye - jacobian.mT, case.cotangent[:, :, None])[:, :, 0]
            expected = torch.autograd.grad(f(z), case.leaves, u)
            z = f(z)
        close([state], [z], EXACT)
        close(torch.autograd.grad(state, case.leaves, case.cotangent, retain_graph=True), expected, 1e-10)


def test_states_are_the_best_so_far_and_finite():
    """From the first step on this map only grows: its best iterate is the start."""
    z0 = randn(2, 3, seed=1)
    calls = Recorded(lambda z: 1e60 * z + 1)
    with torch.no_grad():
        solution = fixed_point(calls, z0, solver=FixedPoint(max_steps=8, tol=None), states=(1, 7), on_failure="ignore")
    assert len(calls.calls) >= 8 and not calls.calls[-2].isfinite().all()
    assert all(torch.equal(state, z0) for state in solution.states)


@pytest.mark.parametrize("solver", [Broyden(max_steps=60, tol=1e-9), Anderson(max_steps=60, tol=1e-9)])
def test_states_after_the_end_are_the_end(solver):
    case = Case()
    f = case.map.bind(case.x)
    with torch.no_grad():
        solution = fixed_point(f, START, solver=solver, states=(50, 3))
        short = fixed_point(f, START, solver=type(solver)(max_steps=3, tol=1e-9))
    assert solution.stats.num_steps.max() < 50
    assert torch.equal(solution.states[0], solution.z_star), "in the order asked for, none left out"
    assert torch.equal(solution.states[1], short.z_star)


def test_states_have_the_form_of_the_state_and_memory_of_their_own():
    w, x = 0.3 * randn(4, 4, seed=1), randn(2, 4, seed=2).requires_grad_()

    def f(z):
        a, b = torch.tanh(torch.cat((z["a"], z["b"]), 1) @ w + x).split([3, 1], 1)
        return {"a": a, "b": b}

    z0 = {"a": torch.zeros(2, 3, dtype=DTYPE), "b": torch.zeros(2, 1, dtype=DTYPE)}
    solution = DEQ(solver=Broyden(max_steps=9, tol=None), grad=UPG(k=2))(f, z0, states=[1, 4], unrolled=True)
    assert [state["a"].shape for state in (*solution.states, *solution.unrolled)] == [(2, 3)] * 4
    before = solution.z_star["b"].clone()
    solution.states[1]["b"].add_(1.0)
    sum(state["a"].square().sum() for state in solution.states).backward()
    assert x.grad.abs().max() > 0 and torch.equal(solution.z_star["b"], before)


def test_what_states_cost_is_counted():
    calls = Recorded(lambda z: 0.5 * z + 1)
    solution = fixed_point(calls, randn(2, 3, seed=1), solver=FixedPoint(max_steps=9, tol=None), states=(1, 2))
    assert solution.stats.num_evals == len(calls.calls) == 10 + 3 * 5


def test_the_backward_of_a_state_follows_the_policy_of_the_solve():
    """One step of the adjoint solve is not enough, for the states as for the value."""
    w, grad = torch.tensor(0.9, dtype=DTYPE, requires_grad=True), Implicit(solver=FixedPoint(max_steps=1, tol=1e-6))
    for on_failure in ("raise", "ignore"):
        solution = fixed_point(
            lambda z: w * z + 1,
            torch.zeros(2, 3, dtype=DTYPE),
            solver=FixedPoint(max_steps=500, tol=1e-9),
            grad=grad,
            states=(3,),
            on_failure=on_failure,
        )
        for state in (*solution.states, solution.value):
            with pytest.raises(SolveError, match="adjoint solve") if on_failure == "raise" else nullcontext():
                torch.autograd.grad(state.sum(), w)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_states_of_numbers_whose_squares_leave_the_range(scale):
    b = scale * randn(3, 4, seed=1).float()
    with torch.no_grad():
        (state,) = fixed_point(
            lambda z: 0.5 * z + b, torch.zeros(3, 4), solver=FixedPoint(max_steps=9, tol=None), states=(3,)
        ).states
    torch.testing.assert_close(state / scale, 1.75 * b / scale)


def test_states_under_a_transform():
    case = Case(radius=0.5)

    def loss(weight):
        solution = fixed_point(
            lambda z: torch.tanh(z @ weight.T + case.map.bias) + case.x.detach(),
            START,
            solver=FixedPoint(max_steps=9, tol=None),
            grad=NPG(k=3),
            states=(2, 5),
        )
        return sum((state * case.cotangent).sum() for state in solution.states)

    weight = case.map.weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss(weight), weight)
    close([torch.func.grad(loss)(weight.detach())], [expected], EXACT)


@pytest.mark.parametrize(
    ("grad", "lam"), [(UPG(k=4, lam=0.5), 0.5), (UPG(k=4, lam=0.5, checkpoint=True), 0.5), (BPTT(num_steps=4), 1.0)]
)
def test_unrolled_states_are_the_steps(grad, lam):
    case = Case()
    f = case.map.bind(case.x)
    solution = fixed_point(f, START, solver=FixedPoint(max_steps=6, tol=None), grad=grad, unrolled=True)
    z = START if isinstance(grad, BPTT) else solution.z_star
    for state in solution.unrolled:
        z = lam * f(z) + (1 - lam) * z
        close([state], [z], EXACT)
        expected = torch.autograd.grad(z, case.leaves, case.cotangent, retain_graph=True)
        close(torch.autograd.grad(state, case.leaves, case.cotangent, retain_graph=True), expected, EXACT)
    assert len(solution.unrolled) == 4 and torch.equal(solution.unrolled[-1], solution.value)


def test_nobody_asks_and_nothing_is_kept():
    with torch.no_grad():
        solution = fixed_point(lambda z: 0.5 * z, START, unrolled=True)
    assert solution.unrolled is None and solution.states == ()
    assert fixed_point(lambda z: 0.5 * z, START).unrolled is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": (0,)}, "states=0 must be an integer >= 1, a step of the solve"),
        ({"states": (1.5,)}, "states=1.5 must be an integer"),
        ({"states": (2,), "grad": BPTT(num_steps=3)}, "the gradient of BPTT: unrolled=True gives its steps"),
        ({"states": (2,), "grad": SHINE()}, "the gradient of SHINE: use UPG, NPG or Implicit"),
        ({"unrolled": True, "grad": NPG()}, "unrolled=True needs UPG or BPTT: NPG unrolls no steps"),
    ],
    ids=["zero", "fraction", "bptt", "shine", "npg"],
)
def test_what_cannot_be_asked_for(settings, message):
    with pytest.raises(ValueError) as caught:
        fixed_point(lambda z: 0.5 * z, START, **settings)
    assert message in str(caught.value)


def test_a_number_is_no_sequence_of_steps():
    with pytest.raises(TypeError, match=r"states=2 must be a sequence of steps, such as \(2,\)"):
        fixed_point(torch.tanh, START, states=2)
    for states in ({5, 10}, torch.arange(3)):  # no order, and no integers
        with pytest.raises(TypeError, match=r"must be a sequence of steps, such as \(5, 10\)"):
            fixed_point(torch.tanh, START, states=states)


def test_states_under_vmap():
    xs, z0 = randn(3, 2, 4, seed=1), torch.zeros(2, 4, dtype=DTYPE)
    weight = with_radius(0.7, 4, seed=2)

    def state(x):
        return fixed_point(lambda z: torch.tanh(z @ weight.mT) + x, z0, grad=NPG(k=3), states=(2,)).states[0]

    torch.testing.assert_close(torch.func.vmap(state)(xs), torch.stack([state(x) for x in xs]), rtol=1e-12, atol=0)
