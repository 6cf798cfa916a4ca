"""The life of a graph: several forwards, retained, skipped and accumulated backwards, forms of the state, memory."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phantom import DEQ, Broyden, FixedPoint, Implicit, fixed_point
from tests.phantom.cases import BATCH, DIM, SOLVE, Case, close, each
from tests.phantom.problems import DTYPE, Regression, randn

EXACT = 1e-10  # between sums taken in another order, over solves that stop on their own
SAME = 1e-12  # between two ways to do the same arithmetic


@each()
def test_two_forwards_before_one_backward(grad):
    case, other = Case(), randn(BATCH, DIM, seed=30)
    separate = [
        torch.autograd.grad(
            fixed_point(case.map.bind(x), case.z_star, solver=SOLVE, grad=grad).value.square().sum(),
            [case.map.weight, case.map.bias],
        )
        for x in (case.x, other)
    ]
    values = [fixed_point(case.map.bind(x), case.z_star, solver=SOLVE, grad=grad).value for x in (case.x, other)]
    together = torch.autograd.grad(sum(v.square().sum() for v in values), [case.map.weight, case.map.bias])
    close(together, [a + b for a, b in zip(*separate, strict=True)], SAME)


@each()
def test_one_equilibrium_inside_another_cell(grad):
    """The second solve's injection is the first one's value: the cotangent crosses two estimators."""
    case = Case()
    first = case.solve(grad)
    second = fixed_point(case.map.bind(first.value), case.z_star, solver=SOLVE, grad=grad)
    gradient = torch.autograd.grad(second.value, case.leaves, case.cotangent)
    (g,) = torch.autograd.grad(
        fixed_point(
            case.map.bind(inner := first.value.detach().requires_grad_()), case.z_star, solver=SOLVE, grad=grad
        ).value,
        inner,
        case.cotangent,
    )
    close([gradient[2]], torch.autograd.grad(case.solve(grad).value, case.x, g), SAME)


@each()
def test_retain_graph_gives_the_same_gradient_twice(grad):
    case = Case()
    value = case.solve(grad).value
    first = torch.autograd.grad(value, case.leaves, case.cotangent, retain_graph=True)
    second = torch.autograd.grad(value, case.leaves, case.cotangent, retain_graph=True)
    close(first, second, 0.0)
    value.backward(case.cotangent, retain_graph=True)
    value.backward(case.cotangent)
    close([leaf.grad for leaf in case.leaves], [2 * gradient for gradient in first], 1e-14)
    with pytest.raises(RuntimeError, match=r"(?i)second time|already been freed|unpack"):
        value.backward(case.cotangent)


@each()
def test_gradients_accumulate(grad):
    model = Regression(DEQ(solver=SOLVE, grad=grad))
    x = randn(6, 3, seed=6)
    (model(x).square().sum() / 6).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in (x[:2], x[2:5], x[5:]):
        (model(part).square().sum() / 6).backward()
    close([p.grad for p in model.parameters()], whole, EXACT)


@each()
def test_a_skipped_backward_frees_everything(grad):
    class Activation:  # dies with the last graph that refers to it
        pass

    def forward() -> tuple[weakref.ref, ...]:
        case, mark = Case(), Activation()
        weight = case.map.weight * 1.0
        weight.mark = mark
        value = fixed_point(lambda z: torch.tanh(z @ weight.mT) + case.x, case.z_star, solver=SOLVE, grad=grad).value
        return weakref.ref(mark), weakref.ref(weight), weakref.ref(value), weakref.ref(case)

    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in forward()] == [None] * 4
    finally:
        gc.enable()


@each()
def test_a_tuple_state_is_the_concatenated_one(grad):
    """Two resolutions of one coupled map give the same as their concatenation."""
    case = Case()
    f = case.map.bind(case.x)

    def split(z: Tensor) -> tuple[Tensor, Tensor]:
        return z[:, :4].reshape(BATCH, 1, 2, 2), z[:, 4:]

    def join(z: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([part.reshape(BATCH, -1) for part in z], dim=1)

    coarse = FixedPoint(max_steps=3, tol=None)
    z0 = randn(BATCH, DIM, seed=23)
    whole = fixed_point(f, z0, solver=coarse, grad=grad)
    parts = fixed_point(lambda z: split(f(join(z))), split(z0), solver=coarse, grad=grad)
    assert [part.shape for part in parts.value] == [(BATCH, 1, 2, 2), (BATCH, 2)]
    close([join(parts.value), join(parts.z_star)], [whole.value, whole.z_star], SAME)
    close(
        torch.autograd.grad(join(parts.value), case.leaves, case.cotangent),
        torch.autograd.grad(whole.value, case.leaves, case.cotangent),
        SAME,
    )


@each()
def test_a_single_part_may_carry_the_whole_loss(grad):
    case = Case()
    f = case.map.bind(case.x)

    def pair(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(f(torch.cat(z, dim=1)).split([2, 4], dim=1))

    start = tuple(case.z_star.split([2, 4], dim=1))
    value = fixed_point(pair, start, solver=SOLVE, grad=grad).value
    mask = torch.cat((torch.zeros(BATCH, 2, dtype=DTYPE), torch.ones(BATCH, 4, dtype=DTYPE)), dim=1)
    expected = torch.autograd.grad(case.solve(grad).value, case.leaves, mask)
    close(torch.autograd.grad(value[1].sum(), case.leaves), expected, EXACT)


@each()
def test_channels_last_gives_the_same_gradient(grad):
    weight = (0.1 * randn(3, 3, 3, 3, seed=24)).requires_grad_()
    x = randn(2, 3, 5, 4, seed=25).requires_grad_()
    cotangent = randn(2, 3, 5, 4, seed=26)
    solver = FixedPoint(max_steps=6, tol=None)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        z0 = torch.zeros(2, 3, 5, 4, dtype=DTYPE).contiguous(memory_format=layout)
        seen = []

        def f(z: Tensor, seen=seen) -> Tensor:
            seen.append(z.stride())
            return torch.tanh(F.conv2d(z, weight, padding=1)) + x

        solution = fixed_point(f, z0, solver=solver, grad=grad)
        assert set(seen) == {z0.stride()}, "f must see the layout of z0"
        results.append([solution.value, *torch.autograd.grad(solution.value, [weight, x], cotangent)])
    close(*results, SAME)


def resident() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def live_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@each()
def test_memory_is_flat(grad):
    """200 training steps with the garbage collector off: less than 1 MB more, and not one tensor more."""
    model = Regression(DEQ(solver=Broyden(max_steps=6, tol=None), grad=grad), dim=32)
    if isinstance(grad, Implicit):
        model.deq.grad = Implicit(solver=type(grad.solver)(max_steps=6, tol=None))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = randn(64, 3, seed=50)  # one state is 16 kB: one leaked a step would be 3 MB

    def step(skip_backward: bool) -> None:
        loss = model(x).square().mean()
        if not skip_backward:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    gc.collect()
    gc.disable()
    try:
        for i in range(20):
            step(i % 10 == 9)
        tensors, growth = live_tensors(), []
        for _ in range(3):  # a leak grows every time; the allocator's own heap, used by earlier tests, settles
            memory = resident()
            for i in range(200):
                step(i % 10 == 9)
            growth.append(resident() - memory)
            if growth[-1] < 1_000_000:
                break
        assert live_tensors() == tensors
        assert min(growth) < 1_000_000
    finally:
        gc.enable()
