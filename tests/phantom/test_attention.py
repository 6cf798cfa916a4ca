"""Attention inside f: fused where f is differentiated once, in plain steps where it is differentiated again."""

import threading

import pytest
import torch
from torch import Tensor, func
from torch.nn.attention import SDPBackend, sdpa_kernel

from phantom import BPTT, DEQ, NPG, UPG, Broyden, FixedPoint, Implicit, JacobianRegularizer, fixed_point
from phantom.runtime.frozen import twice_differentiable
from tests.phantom.attentions import Attentions, bind, iterated, leaves, written_out
from tests.phantom.problems import randn

EXACT = 1e-9
SOLVE = Broyden(max_steps=40, tol=1e-13)
IMPLICIT = Implicit(solver=SOLVE)


def equilibrium(weight: Tensor, x: Tensor, grad=IMPLICIT) -> Tensor:
    return fixed_point(bind(weight, x), torch.zeros_like(x), solver=SOLVE, grad=grad).value


def loss(solve):
    return lambda weight, x: solve(weight, x).square().sum()


def fused_calls(run) -> int:
    with Attentions() as attentions:
        run()
    return attentions.fused


def test_the_penalty_is_that_of_attention_written_out():
    parameters, z = leaves(), randn(2, 3, 4, seed=3)

    def penalty(*given: Tensor, **attend) -> Tensor:
        torch.manual_seed(5)
        return JacobianRegularizer(num_probes=2)(bind(*given, **attend), z)

    expected = penalty(*parameters, attend=written_out)
    found = penalty(*parameters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(p, parameters) for p in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    assert torch.autograd.gradcheck(penalty, parameters, fast_mode=True)
    assert torch.autograd.gradgradcheck(penalty, parameters, fast_mode=True)
    assert fused_calls(lambda: penalty(*parameters)) == 0


@pytest.mark.parametrize("grad", [UPG(k=2), NPG(k=3), BPTT(num_steps=3)], ids=lambda grad: type(grad).__name__)
def test_a_penalty_leaves_the_solve_and_the_gradient_their_kernels(grad):
    """A penalty of the user's own is in plain steps, too."""
    weight, x = leaves()

    def own(f, z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
        return slope.square().mean()

    def calls(regularizer) -> int:
        deq = DEQ(solver=FixedPoint(max_steps=6, tol=None), grad=grad, regularizer=regularizer)
        with Attentions() as attentions:
            solution = deq(bind(weight, x), torch.zeros_like(x))
            (solution.value.sum() + (solution.penalty or 0.0)).backward()
        return attentions.fused

    assert calls(None) == calls(own) == calls(JacobianRegularizer()) >= 3


def test_the_second_derivative_of_implicit():
    parameters = leaves()

    def of_the_gradient(solve) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(loss(solve)(*parameters), parameters, create_graph=True)
        return torch.autograd.grad(sum(gradient.sin().sum() for gradient in gradients), parameters)

    for a, b in zip(of_the_gradient(equilibrium), of_the_gradient(iterated), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    assert torch.autograd.gradgradcheck(equilibrium, parameters, fast_mode=True, check_undefined_grad=False)
    assert fused_calls(lambda: equilibrium(*parameters).sum().backward()) > 5


@pytest.mark.parametrize("transform", [func.hessian, lambda f: func.jacrev(func.grad(f)), func.jacfwd])
def test_the_derivatives_of_torch_func(transform):
    """Forward mode is in all of them but one: no fused kernel has it."""
    given = [leaf.detach() for leaf in leaves()]
    expected = transform(loss(iterated))(*given)
    found = transform(loss(equilibrium))(*given)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_autograd_around_torch_func():
    weight, x = leaves()

    def of_the_slope(solve) -> Tensor:
        return torch.autograd.grad(func.grad(loss(solve))(weight, x).sin().sum(), weight)[0]

    torch.testing.assert_close(of_the_slope(equilibrium), of_the_slope(iterated), rtol=EXACT, atol=EXACT)


def test_unrolled_steps_have_further_derivatives_under_the_switch_of_torch():
    """In the forward pass nobody knows whether the graph will be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        found = func.jacfwd(lambda *given: equilibrium(*given, BPTT(num_steps=60)))(*leaves())
        torch.testing.assert_close(found, func.jacrev(iterated)(*leaves()), rtol=EXACT, atol=EXACT)
        assert torch.autograd.gradgradcheck(
            lambda *given: equilibrium(*given, BPTT(num_steps=3)), leaves(), fast_mode=True
        )


def test_the_kernels_are_as_they_were():
    weight, x = (leaf.detach() for leaf in leaves())
    f = bind(weight, x)
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with twice_differentiable():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with twice_differentiable():
        left.set()
        thread.join()  # the first to enter leaves first
        assert fused_calls(lambda: f(x)) == 0
    assert fused_calls(lambda: f(x)) == 1
    with sdpa_kernel(SDPBackend.MATH):
        JacobianRegularizer()(f, x)
        assert fused_calls(lambda: f(x)) == 0
