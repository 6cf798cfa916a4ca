"""A map that writes to its argument gives what its out-of-place form gives, and leaves the caller's tensors alone."""

import pytest
import torch
from torch import Tensor, nn

from phantom import BPTT, DEQ, NPG, UPG, Anderson, Broyden, FixedPoint, Implicit, fixed_point
from phantom.runtime import purity
from phantom.solve import solve
from tests.phantom.cases import close
from tests.phantom.problems import DTYPE, randn, with_radius
from tests.phantom.solvers import each

SOLVERS = {
    "plain": FixedPoint(max_steps=80, tol=1e-10),
    "anderson": Anderson(max_steps=40, tol=None),
    "broyden": Broyden(max_steps=40, tol=1e-10),
    "nothing": FixedPoint(max_steps=0, tol=None),
}
ESTIMATORS = {
    "upg": UPG(k=3, lam=0.5),
    "upg_undamped": UPG(k=3, lam=1.0),
    "upg_checkpoint": UPG(k=3, lam=0.5, checkpoint=True),
    "npg": NPG(k=3, lam=0.5),
    "implicit": Implicit(solver=Broyden(max_steps=60, tol=1e-12)),
    "bptt": BPTT(num_steps=5),
    "bptt_damped": BPTT(num_steps=5, lam=0.6),
}


def scale_in_place(z: Tensor) -> Tensor:
    z.mul_(0.5)
    z.add_(1.0)
    return z


def scale_uncounted(z: Tensor) -> Tensor:
    """torch counts no write through `.data`, or through numpy."""
    z.data.mul_(0.5)
    z.detach().numpy()[:] += 1.0
    return z


def write_through_a_view(z: Tensor) -> Tensor:
    z[:, 0] = 3.0
    return 0.5 * z + 1.0


def scale_a_pair(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    z[0].mul_(0.5).add_(1.0)
    return z[0], 0.25 * z[1] + 0.5 * z[0]


@each({name: solver for name, solver in SOLVERS.items() if name != "nothing"})
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_solution_is_that_of_the_function(solver, mode):
    with mode():
        twice = [2.0] * 4
        for f, expected in (
            (scale_in_place, twice),
            (scale_uncounted, twice),
            (write_through_a_view, [2.5, 2.0, 2.0, 2.0]),
        ):
            z0 = torch.full((3, 4), 7.0, dtype=DTYPE)
            solution = fixed_point(f, z0, solver=solver, grad=NPG(k=1, lam=1.0))
            z = solution.z_star
            torch.testing.assert_close(z, torch.tensor(expected, dtype=DTYPE).expand(3, 4), rtol=0, atol=1e-8)
            assert (z0 == 7).all(), "the guess belongs to the caller"
            assert solution.stats.residual.max() < 1e-8


@each(SOLVERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_pair_may_be_written_to(solver, batch):
    """Of one problem the parts are dense: what f sees with a graph is the state itself, not a copy."""
    z0 = (torch.zeros(batch, 4, dtype=DTYPE), torch.zeros(batch, 2, 2, dtype=DTYPE))

    def f(z):
        first, second = scale_a_pair((z[0], z[1].flatten(1)))
        return first, second.view_as(z[1])

    for grad in ESTIMATORS.values():
        solution = fixed_point(f, z0, solver=solver, grad=grad)
        assert all((part == 0).all() for part in z0)
        if solver.max_steps:  # z = (2, 4/3)
            for part, value in zip(solution.z_star, (2.0, 4 / 3), strict=True):
                if not isinstance(grad, BPTT):
                    torch.testing.assert_close(part, torch.full_like(part, value), rtol=0, atol=1e-8)


@each(SOLVERS)
@pytest.mark.parametrize("grad", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("cell", ["relu", "both_used"])
def test_gradients_are_those_of_the_out_of_place_cell(solver, grad, cell):
    weight, x = with_radius(0.8, 6, seed=1).requires_grad_(), randn(4, 6, seed=2)

    def gradient(in_place: bool) -> tuple[Tensor, ...]:
        activation = nn.ReLU(inplace=in_place)

        def f(z: Tensor) -> Tensor:
            h = activation(z)
            return torch.tanh(h @ weight.mT) + x if cell == "relu" else 0.3 * h + 0.3 * torch.tanh(h @ weight.mT) + x

        value = fixed_point(f, randn(4, 6, seed=3), solver=solver, grad=grad).value
        return (value.detach(), *torch.autograd.grad(value.square().sum(), weight))

    close(gradient(True), gradient(False), 1e-12)


def test_a_map_that_begins_to_write_later_is_refused():
    calls = []

    def f(z: Tensor) -> Tensor:
        calls.append(z)
        return 0.5 * z + 1 if len(calls) < 3 else z.mul_(0.5).add_(1)

    with pytest.raises(RuntimeError, match="f wrote to its argument at a later evaluation"):
        solve(f, torch.zeros(2, 3), FixedPoint(max_steps=9, tol=None))


def test_a_map_that_writes_elsewhere_is_called_as_it_is(monkeypatch):
    """A buffer of its own is the map's business: no copies are made for it."""
    seen, buffer = [], torch.zeros(2, 3)

    def f(z: Tensor) -> Tensor:
        seen.append(z)
        return buffer.copy_(z).mul_(0.5).add_(1.0)

    copies, copied = [], purity._counted_copy
    monkeypatch.setattr(purity, "_counted_copy", lambda z: copies.append(z) or copied(z))
    z, stats, _ = solve(f, torch.zeros(2, 3), FixedPoint(max_steps=40, tol=1e-6))
    assert stats.converged.all() and len(seen) > 5 and len(copies) == 1, "the first call finds that out"
    torch.testing.assert_close(z, torch.full_like(z, 2.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grad", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("steps", [0, 30])
def test_the_value_may_be_written_to(grad, parts, mode, steps):
    """A head that begins with relu_ or += changes neither the solution, nor the guess, nor the gradient."""
    weight, x = with_radius(0.8, 6, seed=1).requires_grad_(), randn(4, 6, seed=2)

    def f(z):
        whole = torch.tanh(torch.cat(z, 1) @ weight.mT + x if parts == 2 else z @ weight.mT + x)
        return tuple(whole.split([2, 4], dim=1)) if parts == 2 else whole

    z0 = randn(4, 6, seed=3)
    z0 = tuple(part.contiguous() for part in z0.split([2, 4], dim=1)) if parts == 2 else z0
    kept = [part.clone() for part in (z0 if parts == 2 else (z0,))]
    results = []
    with mode():
        for write in (False, True):
            solution = DEQ(solver=FixedPoint(max_steps=steps, tol=None), grad=grad)(f, z0)
            states = solution.value if parts == 2 else (solution.value,)
            stars = [part.clone() for part in (solution.z_star if parts == 2 else (solution.z_star,))]
            if write:
                for state in states:
                    state += 1.0
                    state.relu_()
            else:
                states = [torch.relu(state + 1.0) for state in states]
            after = solution.z_star if parts == 2 else (solution.z_star,)
            close(after, stars, 0.0)
            close(z0 if parts == 2 else (z0,), kept, 0.0)
            result = list(states)
            if torch.is_grad_enabled():
                result += torch.autograd.grad(sum(state.square().sum() for state in states), weight)
            results.append([t.detach() for t in result])
    close(results[1], results[0], 1e-12)
