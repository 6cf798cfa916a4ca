"""The rollout: the last iterate, exactly `max_steps` evaluations, no residual."""

import pytest
import torch

from phantom import BPTT, NPG, UPG, FixedPoint, Implicit, Rollout, fixed_point
from tests.phantom.problems import DTYPE, with_radius

GROWTH = torch.tensor([[1.5, 0.2], [0.0, -1.2]], dtype=torch.float64)  # no step comes nearer to the fixed point


def counted():
    calls = []

    def f(z):
        calls.append(1)
        return z @ GROWTH.T + 1.0

    return f, calls


@pytest.mark.parametrize("lam", [1.0, 0.3])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_last_iterate_after_exactly_so_many_evaluations(lam, steps):
    f, calls = counted()
    z0 = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    with torch.no_grad():
        solution = fixed_point(f, z0, solver=Rollout(max_steps=steps, lam=lam), grad=UPG(k=1, lam=1.0))
    # z_n = B^n z0 + (I + ... + B^{n-1}) lam c
    damped = lam * GROWTH + (1 - lam) * torch.eye(2, dtype=torch.float64)
    expected = z0
    for _ in range(steps):
        expected = expected @ damped.T + lam
    torch.testing.assert_close(solution.value, expected, rtol=1e-14, atol=1e-14)
    assert len(calls) == solution.stats.num_evals == steps
    assert solution.stats.num_steps.tolist() == [steps, steps]
    assert solution.stats.residual.isnan().all()
    assert not solution.stats.converged.any() and not solution.stats.diverged.any()


def test_other_solvers_return_the_best_iterate_instead():
    f, _ = counted()
    z0 = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    with torch.no_grad():
        best = fixed_point(f, z0, solver=FixedPoint(max_steps=4, tol=None, stop="absolute"), grad=UPG(k=1, lam=1.0))
        last = fixed_point(f, z0, solver=Rollout(max_steps=4), grad=UPG(k=1, lam=1.0))
    assert torch.equal(best.value, z0) and not torch.equal(last.value, z0)


@pytest.mark.parametrize("grad", [UPG(k=1, lam=1.0), NPG(k=1, lam=1.0)])
def test_a_rollout_and_one_step_have_the_value_of_the_whole_iteration(grad):
    f, calls = counted()
    z0 = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    attached = fixed_point(f, z0, solver=Rollout(max_steps=3), grad=grad)
    assert len(calls) == attached.stats.num_evals == 4
    assert torch.equal(attached.value, fixed_point(f, z0, solver=Rollout(max_steps=3), grad=BPTT(num_steps=4)).value)


def test_where_a_rollout_does_not_belong():
    with pytest.raises(ValueError, match=r"tol=0\.1 must be None \(null in YAML\): a rollout measures no residual"):
        Rollout(max_steps=3, tol=0.1)
    with pytest.raises(ValueError, match="lam=2 must be in"):
        Rollout(max_steps=3, lam=2)
    with pytest.raises(ValueError, match="measures no residual: the adjoint solve needs one"):
        Implicit(solver=Rollout(max_steps=3))


@pytest.mark.parametrize("solver", [Rollout(max_steps=4), FixedPoint(max_steps=4, tol=None)], ids=str)
def test_a_map_that_switches_grad_on_leaves_no_graph(solver):
    weight = with_radius(0.5, 3, seed=1).requires_grad_()

    def f(z):
        with torch.enable_grad():
            return torch.tanh(z @ weight.mT) + 1

    z0 = torch.zeros(2, 3, dtype=DTYPE)
    solution = fixed_point(f, z0, solver=solver, grad=UPG(k=1, lam=1.0), in_place=True)
    assert not solution.z_star.requires_grad
    found = torch.autograd.grad(solution.value.sum(), weight)[0]
    expected = torch.autograd.grad(f(solution.z_star).sum(), weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
