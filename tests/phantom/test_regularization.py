"""The Jacobian regulariser against dense Jacobians and finite differences."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phantom import BPTT, DEQ, NPG, UPG, Broyden, FixedPoint, Implicit, JacobianRegularizer, fixed_point
from phantom.diagnostics import dense_jacobian
from tests.phantom.problems import DTYPE, randn, with_radius

PROBES = 4000
SPREAD = 0.05  # about three standard deviations of a mean over that many probes
DIFFERENCES = 1e-7  # of central differences in float64


@pytest.fixture
def leaves() -> list[Tensor]:
    return [with_radius(0.8, 4, seed=1).requires_grad_(), randn(3, 4, seed=2).requires_grad_()]


def bind(weight: Tensor, x: Tensor):
    return lambda z: torch.tanh(z @ weight.mT + x)


def test_the_mean_is_the_frobenius_norm(leaves):
    z = randn(3, 4, seed=3)
    expected = dense_jacobian(bind(*leaves), z).square().sum() / z.numel()
    torch.manual_seed(0)
    penalty = JacobianRegularizer(num_probes=PROBES)(bind(*leaves), z)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(expected.item(), rel=SPREAD)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_an_empty_batch_has_no_penalty(shape):
    scale = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    penalty = JacobianRegularizer()(lambda z: scale * z, torch.zeros(shape, dtype=DTYPE))
    assert penalty == 0 and torch.autograd.grad(penalty, scale)[0] == 0


def test_the_value_is_that_of_its_probes(leaves):
    z = randn(3, 4, seed=3)
    jacobian = dense_jacobian(bind(*leaves), z)
    torch.manual_seed(5)
    penalty = JacobianRegularizer(num_probes=2)(bind(*leaves), z)
    torch.manual_seed(5)
    probes = [torch.randn_like(z) for _ in range(2)]
    expected = sum(torch.einsum("bij,bi->bj", jacobian, v).square().sum() for v in probes) / (2 * z.numel())
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)


def test_the_gradient_is_that_of_finite_differences(leaves):
    z = randn(3, 4, seed=3).requires_grad_()

    def penalty() -> Tensor:
        torch.manual_seed(5)
        return JacobianRegularizer(num_probes=3)(bind(*leaves), z)

    gradients = torch.autograd.grad(penalty(), [*leaves, z], allow_unused=True)
    assert gradients[2] is None, "the state is a constant of the penalty"
    for leaf, gradient in zip(leaves, gradients, strict=False):
        assert (gradient != 0).all()
        direction = randn(*leaf.shape, seed=6)
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                leaf.add_(direction, alpha=step)
            ends.append(penalty().detach())
            with torch.no_grad():
                leaf.sub_(direction, alpha=step)
        difference = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=DIFFERENCES, atol=DIFFERENCES)


@pytest.mark.parametrize(
    "grad", [UPG(k=3, lam=0.5), NPG(k=3, lam=0.5), Implicit(solver=FixedPoint(max_steps=9, tol=None))]
)
def test_the_penalty_leaves_by_the_solution(leaves, grad):
    """It is taken at z_star, joins any loss, and is absent without grad or without a regulariser."""
    solver, z0 = Broyden(max_steps=30, tol=1e-12), torch.zeros(3, 4, dtype=DTYPE)
    deq = DEQ(solver=solver, grad=grad, regularizer=JacobianRegularizer())
    torch.manual_seed(7)
    solution = deq(bind(*leaves), z0)
    torch.manual_seed(7)
    expected = JacobianRegularizer()(bind(*leaves), solution.z_star)
    torch.testing.assert_close(solution.penalty, expected, rtol=1e-12, atol=0)
    alone = torch.autograd.grad(solution.value.sum(), leaves, retain_graph=True)
    extra = torch.autograd.grad(expected, leaves)
    both = torch.autograd.grad(solution.value.sum() + 0.1 * solution.penalty, leaves)
    for total, a, b in zip(both, alone, extra, strict=True):
        torch.testing.assert_close(total, a + 0.1 * b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert deq(bind(*leaves), z0).penalty is None
    assert fixed_point(bind(*leaves), z0, solver=solver, grad=grad).penalty is None


@pytest.mark.parametrize(
    "grad",
    [UPG(k=3, lam=0.5), NPG(k=3, lam=0.5), Implicit(solver=FixedPoint(max_steps=9, tol=None)), BPTT(num_steps=2)],
    ids=["upg", "npg", "implicit", "bptt"],
)
def test_a_coarse_solve_is_penalised_where_it_ended(leaves, grad):
    """At the detached z_star, not at the value that the estimator moved on to: there is no path through its steps.

    Bai et al. 2021 take the solver's output; unrolled pretraining has none, and its last state stands for it.
    """
    deq = DEQ(solver=FixedPoint(max_steps=2, tol=None), grad=grad, regularizer=JacobianRegularizer())
    torch.manual_seed(7)
    solution = deq(bind(*leaves), torch.zeros(3, 4, dtype=DTYPE))
    found = torch.autograd.grad(solution.penalty, leaves)
    by_hand = torch.zeros(3, 4, dtype=DTYPE)
    for _ in range(2):
        by_hand = bind(*(leaf.detach() for leaf in leaves))(by_hand)
    torch.manual_seed(7)
    expected = JacobianRegularizer()(bind(*leaves), by_hand)
    torch.testing.assert_close(solution.penalty, expected, rtol=1e-12, atol=0)
    for a, b in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    if isinstance(grad, UPG):
        torch.manual_seed(7)
        elsewhere = JacobianRegularizer()(bind(*leaves), solution.value)
        assert abs(elsewhere - expected) > 0.001 * expected, "two steps leave room for a difference"


def test_a_tuple_state_and_autocast():
    weight = (0.3 * randn(6, 6, seed=8)).float().requires_grad_()

    def f(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out = torch.tanh(F.linear(torch.cat((z[0].flatten(1), z[1]), dim=1), weight))
        return out[:, :4].reshape(-1, 1, 2, 2), out[:, 4:]

    z = (torch.zeros(2, 1, 2, 2), torch.zeros(2, 2))
    expected = weight.detach().square().sum() / 6  # the slope of tanh at zero is one
    for enabled in (False, True):
        torch.manual_seed(9)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            penalty = JacobianRegularizer(num_probes=600)(f, z)
        assert penalty.dtype == torch.float32 and penalty.item() == pytest.approx(expected.item(), rel=0.1)
        assert torch.autograd.grad(penalty, weight)[0].abs().sum() > 0


def test_impossible_settings():
    with pytest.raises(ValueError, match="num_probes=0"):
        JacobianRegularizer(num_probes=0)


def test_a_compiled_f_is_penalised_as_it_is_written(leaves):
    class Cell(torch.nn.Module):
        def forward(self, z: Tensor, weight: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(z @ weight.mT + x)

    found = []
    for compiles in (False, True):
        cell = Cell()
        if compiles:
            cell.compile(backend="aot_eager")
        deq = DEQ(solver=FixedPoint(max_steps=80, tol=1e-12), grad=UPG(k=3), regularizer=JacobianRegularizer())
        torch.manual_seed(3)
        solution = deq(partial(cell, weight=leaves[0], x=leaves[1]), torch.zeros(3, 4, dtype=DTYPE))
        loss = solution.value.square().sum() + solution.penalty
        found.append([solution.penalty, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grad", [BPTT(num_steps=4), UPG(k=3)], ids=lambda grad: type(grad).__name__)
def test_a_model_that_is_compiled_as_a_whole_is_penalised_alike(leaves, grad):
    deq = DEQ(solver=FixedPoint(max_steps=5, tol=None), grad=grad, regularizer=JacobianRegularizer())

    def model(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        solution = deq(bind(weight, x), torch.zeros_like(x))
        return solution.value, solution.penalty

    found = []
    for each in (model, torch.compile(model, backend="aot_eager")):
        torch.manual_seed(3)
        value, penalty = each(*leaves)
        found.append([penalty, *torch.autograd.grad(value.square().sum() + penalty, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_cell_that_writes_to_its_argument_and_one_that_ignores_it(leaves):
    weight, x = leaves
    found = []
    for act in (torch.relu, torch.relu_):
        torch.manual_seed(3)
        found.append(JacobianRegularizer()(lambda z, act=act: torch.tanh(act(z) @ weight.mT + x), randn(3, 4, seed=3)))
    assert torch.equal(*found) and found[0] > 0
    for f in (lambda z: torch.ones_like(z) * weight.sum(), lambda z: torch.ones_like(z)):
        assert JacobianRegularizer()(f, randn(3, 4, seed=3)) == 0


def test_under_torch_func(leaves):
    """The value and the gradient of autograd, in reverse, forward and mapped."""
    z = randn(3, 4, seed=3)

    def penalty(weight: Tensor, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return JacobianRegularizer(num_probes=2)(bind(weight, x), z)

    expected = torch.autograd.grad(penalty(*leaves), leaves)
    weight, x = (leaf.detach() for leaf in leaves)
    for found, gradient in zip(torch.func.grad(penalty, argnums=(0, 1))(weight, x), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
    value, moved = torch.func.jvp(penalty, (weight, x), (weight, x))
    along = sum((gradient * leaf).sum() for gradient, leaf in zip(expected, (weight, x), strict=True))
    torch.testing.assert_close((value, moved), (penalty(weight, x), along), rtol=1e-12, atol=1e-14)
    each = torch.func.vmap(penalty, (0, None), randomness="same")(torch.stack([weight, 2 * weight]), x)
    torch.testing.assert_close(each, torch.stack([penalty(weight, x), penalty(2 * weight, x)]), rtol=1e-12, atol=0)


def test_of_a_solve_under_torch_func():
    solver = Broyden(tol=1e-12)
    x = randn(3, 4, seed=2)

    def loss(weight: Tensor) -> Tensor:
        torch.manual_seed(5)
        solution = fixed_point(
            bind(weight, x),
            torch.zeros_like(x),
            solver=solver,
            grad=Implicit(solver=solver),
            regularizer=JacobianRegularizer(),
        )
        return solution.value.square().sum() + solution.penalty

    weight = with_radius(0.5, 4, seed=1).requires_grad_()
    (expected,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), expected, rtol=1e-9, atol=1e-10)
