"""What torch keeps around a solve: weights in a cache, tensors in hooks, the stance of its compiler."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from phantom import BPTT, NPG, UPG, Broyden, FixedPoint, Implicit, fixed_point
from phantom.diagnostics import dense_jacobian, exact_adjoint
from phantom.runtime.frozen import uncompiled
from tests.phantom.problems import DTYPE, randn

SOLVER = FixedPoint(max_steps=200, tol=1e-13)
ADJOINT = Broyden(max_steps=60, tol=1e-12)
ESTIMATORS = [UPG(k=4, lam=0.7), NPG(k=4, lam=0.7), Implicit(solver=ADJOINT)]
X = randn(3, 6, seed=1)


def cell() -> nn.Linear:
    torch.manual_seed(0)
    return parametrizations.weight_norm(nn.Linear(6, 6, dtype=DTYPE))


def gradients(layer: nn.Module, grad, *, cached: bool) -> list[Tensor]:
    layer.zero_grad()
    with parametrize.cached() if cached else torch.enable_grad():
        value = fixed_point(
            lambda z: torch.tanh(0.5 * layer(z) + X), torch.zeros_like(X), solver=SOLVER, grad=grad
        ).value
        value.square().sum().backward()
    return [parameter.grad.clone() for parameter in layer.parameters()]


@pytest.mark.parametrize("grad", ESTIMATORS, ids=lambda grad: type(grad).__name__)
def test_a_cached_parametrization_keeps_its_gradient(grad):
    layer = cell()
    plain, cached = (gradients(layer, grad, cached=cached) for cached in (False, True))
    assert len(plain) == 3 and all(gradient.abs().max() > 1e-3 for gradient in plain)
    for a, b in zip(plain, cached, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)


def test_a_weight_that_was_cached_with_its_graph_stays():
    layer = cell()
    with parametrize.cached():
        before = layer.weight
        fixed_point(lambda z: torch.tanh(0.5 * layer(z) + X), torch.zeros_like(X), solver=SOLVER, grad=UPG(k=1))
        assert layer.weight is before


class Counted(nn.Module):
    """f(z) = tanh(W z + x), which counts its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * randn(6, 6, seed=2))
        self.num_evals = 0

    def forward(self, z: Tensor) -> Tensor:
        self.num_evals += 1
        return torch.tanh(z @ self.weight.T + X)

    def solve(self, grad) -> Tensor:
        return fixed_point(self, torch.zeros_like(X), solver=SOLVER, grad=grad).value


def exact(f: Counted) -> Tensor:
    """The gradient of sum z*^2 by the weight, from a dense solve."""
    with torch.no_grad():
        z = f.solve(UPG(k=1))
    u = exact_adjoint(dense_jacobian(f, z), 2 * z)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(f(z), f.weight, u)
    return gradient


def in_checkpoint(f: Counted, grad) -> Tensor:
    return checkpoint(lambda _: f.solve(grad), X.clone().requires_grad_(), use_reentrant=False)


def on_cpu(f: Counted, grad) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return f.solve(grad)


@pytest.mark.parametrize("way", [in_checkpoint, on_cpu])
@pytest.mark.parametrize("grad", ESTIMATORS[1:], ids=lambda grad: type(grad).__name__)
def test_what_hooks_keep_is_fetched_once_for_all_products(way, grad):
    f = Counted()
    value = way(f, grad)
    forward, f.num_evals = f.num_evals, 0
    value.square().sum().backward()
    # at most the solve once more, with its estimator, and one evaluation for the products
    assert f.num_evals <= forward + 1
    if isinstance(grad, Implicit):
        torch.testing.assert_close(f.weight.grad, exact(f), rtol=1e-9, atol=1e-11)
    else:
        expected = Counted()
        expected.solve(grad).square().sum().backward()
        torch.testing.assert_close(f.weight.grad, expected.weight.grad, rtol=1e-12, atol=1e-14)


class Keeps(nn.Module):
    """A layer that keeps its injection, called on two views: the second call replaces what the first one has kept."""

    def __init__(self, grad) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.inject, self.grad = nn.Linear(6, 6, dtype=DTYPE), nn.Linear(6, 6, dtype=DTYPE), grad

    def forward(self, x: Tensor) -> Tensor:
        self.injection = self.inject(x)
        return fixed_point(self.f, torch.zeros_like(x), solver=SOLVER, grad=self.grad).value

    def f(self, z: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.cell(z) + self.injection)


@pytest.mark.parametrize("keep", ["checkpoint", "save_on_cpu"])
@pytest.mark.parametrize("grad", ESTIMATORS, ids=lambda grad: type(grad).__name__)
def test_a_map_that_has_changed_until_backward_is_refused(keep, grad):
    model, views = Keeps(grad), (X, X.flip(0))

    def gradient(call) -> Tensor:
        first, second = (call(view) for view in views)
        return torch.autograd.grad((first * second).sum(), model.cell.weight)[0]

    def kept(x: Tensor) -> Tensor:
        if keep == "checkpoint":
            return checkpoint(model, x, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    if isinstance(grad, UPG):
        torch.testing.assert_close(gradient(kept), gradient(model))
    else:
        with pytest.raises(RuntimeError, match=f"{type(grad).__name__} evaluates f again in backward"):
            gradient(kept)


@pytest.mark.parametrize("change", [1e-5, 1e-2])
@pytest.mark.parametrize("grad", ESTIMATORS, ids=lambda grad: type(grad).__name__)
def test_a_map_that_rounds_otherwise_in_backward_is_the_same(grad, change):
    """As sums in another order do on a GPU: to half of the digits of float32 it has its value again."""
    weight, rounding = torch.full((6, 6), 0.05, dtype=DTYPE, requires_grad=True), [change, 0.0]

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight + X) * (1 + rounding[0])

    with torch.autograd.graph.save_on_cpu():
        value = fixed_point(f, torch.zeros_like(X), solver=SOLVER, grad=grad).value
    expected = torch.autograd.grad(value.sum(), weight, retain_graph=True)[0]
    rounding.reverse()
    if change > 1e-3 and not isinstance(grad, UPG):
        with pytest.raises(RuntimeError, match="has another value"):
            torch.autograd.grad(value.sum(), weight)
        return
    found = torch.autograd.grad(value.sum(), weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("grad", [*ESTIMATORS, UPG(checkpoint=True), BPTT(num_steps=3, checkpoint=True)], ids=str)
@pytest.mark.parametrize("max_steps", [0, 3])
def test_a_state_of_inference_mode_is_a_start(grad, max_steps):
    weight = torch.full((6, 6), 0.05, dtype=DTYPE, requires_grad=True)
    with torch.inference_mode():
        start = X + 0.5
    found = [
        torch.autograd.grad(
            fixed_point(lambda z: torch.tanh(z @ weight + X), z0, solver=FixedPoint(max_steps=max_steps), grad=grad)
            .value.square()
            .sum(),
            weight,
        )[0]
        for z0 in (start, X + 0.5)
    ]
    assert torch.equal(*found)


def test_threads_that_overlap_leave_the_compiler_as_it_was():
    import torch._dynamo  # without it there is nothing to switch

    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with uncompiled():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    second = uncompiled()
    second.__enter__()
    left.set()
    thread.join()  # the first to enter leaves first
    second.__exit__(None, None, None)
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert len(found) == 1


@pytest.mark.parametrize("kept", [False, True], ids=["kept", "checkpoint"])
@pytest.mark.parametrize("grad", [NPG(k=4), Implicit(solver=SOLVER)], ids=lambda grad: type(grad).__name__)
def test_torch_counts_the_operations_that_the_statistics_tell(grad, kept):
    layer, found = nn.Linear(6, 6, dtype=DTYPE), []

    def run(x: Tensor) -> Tensor:
        z0 = torch.zeros_like(X)
        found.append(fixed_point(lambda z: torch.tanh(0.5 * layer(z) + x), z0, solver=SOLVER, grad=grad))
        return found[-1].value

    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        (run(X) if kept else checkpoint(run, X, use_reentrant=False)).sum().backward()
    counted = sum(solution.stats.num_evals + solution.stats.num_vjps for solution in found)
    # the graph of f itself has two products backward, for z and for the weight
    assert counter.get_total_flops() == 2 * X.numel() * 6 * (counted + 2)
