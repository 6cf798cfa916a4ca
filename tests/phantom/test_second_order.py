"""Derivatives of the implicit gradient against closed forms and finite differences; the others refuse, or say less."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phantom import NPG, SHINE, UPG, Anderson, Broyden, FixedPoint, Implicit, fixed_point
from tests.phantom.problems import DTYPE, TanhMap, randn, with_radius

EXACT = 1e-9
SOLVE = Broyden(max_steps=30, tol=1e-13)
GRADS = {
    "broyden": Implicit(solver=Broyden(max_steps=30, tol=1e-13)),
    "anderson": Implicit(solver=Anderson(max_steps=60, tol=1e-13)),
    "plain": Implicit(solver=FixedPoint(max_steps=100, tol=1e-13)),
}
each = pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)


def leaves(dim: int = 3, batch: int = 2) -> list[Tensor]:
    weight = with_radius(0.5, dim, seed=1)
    return [t.requires_grad_() for t in (weight, 0.1 * randn(dim, seed=2), randn(batch, dim, seed=3))]


def equilibrium(grad, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return fixed_point(
        lambda z: torch.tanh(z @ weight.mT + bias) + x, torch.zeros_like(x), solver=SOLVE, grad=grad
    ).value


def newton(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Return the same equilibrium by Newton steps of plain torch, differentiable in every order."""
    eye, z = torch.eye(x.shape[1], dtype=DTYPE), torch.zeros_like(x)
    for _ in range(12):
        hidden = torch.tanh(z @ weight.mT + bias)
        system = eye - (1 - hidden**2)[:, :, None] * weight
        z = z + torch.linalg.solve(system, hidden + x - z)
    return z


@each
def test_gradgradcheck(grad):
    def f(*args: Tensor) -> Tensor:
        return equilibrium(grad, *args)

    assert torch.autograd.gradgradcheck(f, leaves(2, 1), eps=1e-6, atol=1e-7, check_undefined_grad=False)


@each
@pytest.mark.parametrize("loss", ["linear", "quadratic"])
def test_the_hessian_is_that_of_newton_s_method(grad, loss):
    """Newton's method is quadratic in the derivatives, too: after twelve steps all of them are exact."""
    parameters, g = leaves(), randn(2, 3, seed=4)

    def hessian(solve) -> list[Tensor]:
        value = solve(*parameters)
        scalar = (value * g).sum() if loss == "linear" else (value.square() * g).sum()
        first = torch.autograd.grad(scalar, parameters, create_graph=True)
        rows = []
        for entry in torch.cat([t.flatten() for t in first]):
            second = torch.autograd.grad(entry, parameters, retain_graph=True)
            rows.append(torch.cat([t.flatten() for t in second]))
        return torch.stack(rows)

    expected = hessian(newton)
    found = hessian(lambda *args: equilibrium(grad, *args))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found, found.mT, rtol=EXACT, atol=EXACT)
    assert expected.abs().max() > 0.1


@each
def test_finite_differences_of_the_gradient(grad):
    parameters = leaves()

    def penalty(create_graph: bool) -> Tensor:
        value = equilibrium(grad, *parameters)
        gradients = torch.autograd.grad(value.square().sum(), parameters, create_graph=create_graph)
        return sum(gradient.square().sum() for gradient in gradients)

    second = torch.autograd.grad(penalty(True), parameters)
    for leaf, derivative in zip(parameters, second, strict=True):
        direction, ends = randn(*leaf.shape, seed=5), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                leaf.add_(direction, alpha=step)
            ends.append(penalty(False))
            with torch.no_grad():
                leaf.sub_(direction, alpha=step)
        difference = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((derivative * direction).sum(), difference, rtol=1e-7, atol=1e-7)


def test_the_third_derivative():
    """z = sin(z) / 2 + x, one unknown: x(z) = z - sin(z) / 2 gives dz/dx, and its derivatives, by hand."""
    x = randn(4, 1, seed=6).requires_grad_()
    z = fixed_point(lambda z: 0.5 * torch.sin(z) + x, torch.zeros_like(x), solver=SOLVE, grad=GRADS["broyden"]).value
    orders = [z]
    for _ in range(3):
        orders.append(torch.autograd.grad(orders[-1].sum(), x, create_graph=True)[0])
    z = z.detach()
    s, c = torch.sin(z) / 2, torch.cos(z) / 2
    first = 1 / (1 - c)
    second = -s * first**3
    third = (-c * first**4) + 3 * s**2 * first**5
    for found, expected in zip(orders[1:], (first, second, third), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=EXACT, atol=EXACT)


@each
def test_create_graph_does_not_change_the_first_derivative(grad):
    """Also where the solves are coarse: f is evaluated again at the same z_star, and u is the same."""
    parameters, coarse = leaves(), FixedPoint(max_steps=2, tol=None)
    grad = Implicit(solver=type(grad.solver)(max_steps=2, tol=None))

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        weight, bias, x = parameters
        value = fixed_point(
            lambda z: torch.tanh(z @ weight.mT + bias) + x, torch.zeros_like(x), solver=coarse, grad=grad
        ).value
        return torch.autograd.grad(value.square().sum(), parameters, create_graph=create_graph)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_a_force_and_its_training():
    """Energy E(x) of an equilibrium, force -dE/dx, and the gradient of a loss on the force by the weights."""
    weight, bias, x = leaves()
    target = randn(2, 3, seed=7)

    def loss(solve) -> Tensor:
        force = -torch.autograd.grad(solve(weight, bias, x).square().sum(), x, create_graph=True)[0]
        return (force - target).square().sum()

    expected = torch.autograd.grad(loss(newton), [weight, bias])
    loss(lambda *args: equilibrium(GRADS["broyden"], *args)).backward()
    torch.testing.assert_close(weight.grad, expected[0], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(bias.grad, expected[1], rtol=EXACT, atol=EXACT)


def test_first_and_second_order_in_one_loss():
    """The value and its gradient reach the loss together: both pass through one node in one backward."""
    parameters = leaves()

    def total(solve) -> Tensor:
        value = solve(*parameters)
        (slope,) = torch.autograd.grad(value.square().sum(), parameters[2], create_graph=True)
        return value.sin().sum() + (slope.square() * value).sum()

    expected = torch.autograd.grad(total(newton), parameters)
    found = torch.autograd.grad(total(lambda *args: equilibrium(GRADS["broyden"], *args)), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", ["tuple", "encoder", "checkpoint", "weight_norm", "nested"])
def test_what_f_reads_is_found(kind):
    """States of parts, inputs with a graph of their own, recomputation, weights made inside f, a solve inside f."""
    weight, bias, x = leaves()
    grad, zeros = GRADS["broyden"], torch.zeros_like(x)

    def solve(f, z0=zeros):
        return fixed_point(f, z0, solver=SOLVE, grad=grad).value

    def value() -> Tensor:
        if kind == "tuple":
            pair = solve(lambda z: (torch.tanh(z[0] @ weight.mT + bias) + z[1], x), (zeros, zeros))
            return pair[0]
        if kind == "encoder":
            injection = x * bias + x.sin()
            return solve(lambda z: torch.tanh(z @ weight.mT + bias) + injection)
        if kind == "checkpoint":
            return solve(lambda z: checkpoint(lambda z: torch.tanh(z @ weight.mT + bias) + x, z, use_reentrant=False))
        if kind == "weight_norm":
            return solve(lambda z: torch.tanh(z @ (0.4 * weight / weight.norm(dim=1, keepdim=True)).mT + bias) + x)
        return solve(lambda z: solve(lambda y: 0.3 * torch.tanh(y @ weight.mT + z)) + x * bias)

    def oracle() -> Tensor:
        if kind in ("tuple", "checkpoint"):
            return newton(weight, bias, x)
        if kind == "encoder":
            return newton(weight, bias, x * bias + x.sin())
        if kind == "weight_norm":
            return newton(0.4 * weight / weight.norm(dim=1, keepdim=True), bias, x)
        z = y = zeros  # both equations at once, long enough for every derivative to settle
        for _ in range(120):
            y, z = 0.3 * torch.tanh(y @ weight.mT + z), y + x * bias
        return z

    results = []
    for make in (value, oracle):
        first = torch.autograd.grad(make().square().sum(), [weight, bias, x], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [weight, bias, x])
        results.append((*first, *second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=EXACT, atol=EXACT)


def test_a_gradient_of_an_intermediate_tensor():
    weight, bias, x = leaves()
    injection = 2 * x
    value = equilibrium(GRADS["broyden"], weight, bias, injection)
    (first,) = torch.autograd.grad(value.square().sum(), injection, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
    expected = newton(weight, bias, injection)
    (slope,) = torch.autograd.grad(expected.square().sum(), injection, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(slope.square().sum(), x)[0], rtol=EXACT, atol=EXACT)


def test_hidden_readings_are_refused():
    """Scripted code reads its weight where torch's Python functions are not asked: no silent half of an answer."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3,), 0.5, dtype=DTYPE))

        def forward(self, z: Tensor) -> Tensor:
            return torch.sin(z) * self.weight

    scripted, x = torch.jit.trace(Scaled(), randn(2, 3, seed=1)), randn(2, 3, seed=2).requires_grad_()
    value = fixed_point(lambda z: scripted(z) + x, torch.zeros_like(x), solver=SOLVE, grad=GRADS["broyden"]).value
    with pytest.raises(RuntimeError, match="hides what it reads in compiled"):
        torch.autograd.grad(value.sum(), x, create_graph=True)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(z, w)
        return z * w

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        z, w = ctx.saved_tensors
        return g * w, (g * z).sum(dim=0)


def test_what_an_autograd_function_takes_is_refused_or_shown_by_a_view():
    """z = w sin z + x, whose weight the function hides; by a view of it the second derivative is that of the loop."""
    x, w = randn(2, 3, seed=2), torch.full((3,), 0.5, dtype=DTYPE, requires_grad=True)

    def value(seen: bool) -> Tensor:
        return fixed_point(
            lambda z: Scale.apply(torch.sin(z), w.view_as(w) if seen else w) + x,
            torch.zeros_like(x),
            solver=SOLVE,
            grad=GRADS["broyden"],
        ).value

    with pytest.raises(RuntimeError, match=r"torch\.autograd\.Function"):
        torch.autograd.grad(value(seen=False).sum(), w, create_graph=True)
    loop = torch.zeros_like(x)
    for _ in range(100):
        loop = torch.sin(loop) * w + x
    found, expected = (torch.autograd.grad(z.sum(), w, create_graph=True)[0] for z in (value(seen=True), loop))
    second = [torch.autograd.grad(g.square().sum(), w)[0] for g in (found, expected)]
    torch.testing.assert_close(*second, rtol=EXACT, atol=EXACT)


def test_a_map_that_has_changed_since_the_forward_is_refused():
    """A mask that a module keeps has no graph to be told by: the value of f is another one."""
    weight, _, x = leaves()
    masks = [torch.ones_like(x), torch.tensor([1.0, 0.0, 1.0], dtype=DTYPE)]
    value = fixed_point(
        lambda z: torch.tanh(z @ weight * masks[0] + x), torch.zeros_like(x), solver=SOLVE, grad=GRADS["broyden"]
    ).value
    masks.reverse()
    with pytest.raises(RuntimeError, match="has another value"):
        torch.autograd.grad(value.square().sum(), x, create_graph=True)


def test_weights_that_were_swapped_in_are_gone():
    layer, x = torch.nn.Linear(3, 3, dtype=DTYPE), randn(2, 3, seed=2)
    swapped = {name: (0.2 * weight.detach()).requires_grad_() for name, weight in layer.named_parameters()}

    def solve(x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.sin(layer(z)) + x, torch.zeros_like(x), grad=GRADS["broyden"]).value

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return solve(x)

    value = torch.func.functional_call(Model(), {f"layer.{name}": w for name, w in swapped.items()}, (x,))
    with pytest.raises(RuntimeError, match="functional_call"):
        torch.autograd.grad(value.square().sum(), list(swapped.values()), create_graph=True)


def test_backward_in_another_thread():
    """torch numbers nodes by thread, and runs the backward of a GPU in a thread of its own."""
    weight, bias, x = leaves()
    encoded = x
    for _ in range(20):  # so that the numbers of this thread are above those of the other one
        encoded = encoded + 0.1 * encoded.sin()
    value = equilibrium(GRADS["broyden"], weight, bias, encoded)

    def penalty(value: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (weight, x), retain_graph=True)

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(penalty, value).result()
    for a, b in zip(found, penalty(newton(weight, bias, encoded)), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("grad", [NPG(k=5, lam=0.5), NPG(k=1, lam=1.0), SHINE()], ids=str)
def test_estimates_refuse(grad):
    parameters = leaves()
    first = torch.autograd.grad(equilibrium(grad, *parameters).square().sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="Implicit, which is exact in every order"):
        torch.autograd.grad(sum(g.square().sum() for g in first), parameters)


@pytest.mark.parametrize("grad", [NPG(k=5, lam=0.5), NPG(k=1, lam=1.0), SHINE()], ids=str)
def test_estimates_refuse_a_derivative_by_their_cotangent(grad):
    """The target of a loss acts on the gradient through the cotangent alone; the term beside it is no excuse."""
    weight, bias, x = leaves()
    target = randn(2, 3, seed=4).requires_grad_()
    loss = (equilibrium(grad, weight, bias, x) - target).square().sum() + target.sum() * weight.sum()
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="Implicit, which is exact in every order"):
        torch.autograd.grad(first.square().sum(), target)
    with pytest.raises(RuntimeError, match="Implicit, which is exact in every order"):
        torch.autograd.functional.jvp(lambda x: equilibrium(grad, weight, bias, x), x.detach(), x.detach())


def test_upg_holds_z_star_fixed():
    """One undamped step from z_star: the gradient is that of f alone, whose derivative moves the weights alone."""
    weight, bias, x = leaves()
    z = equilibrium(UPG(k=1, lam=1.0), weight, bias, x)
    (first,) = torch.autograd.grad(z.square().sum(), bias, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), bias)
    with torch.no_grad():
        star = newton(weight, bias, x)
    held = torch.tanh(star @ weight.mT + bias) + x
    (slope,) = torch.autograd.grad(held.square().sum(), bias, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(slope.sum(), bias)[0], rtol=EXACT, atol=EXACT)


def test_a_cell_of_modules():
    """A map of the estimator tests, with parameters of a module and float32 weights' own rounding out of the way."""
    cell, x = TanhMap(3, radius=0.5, seed=8), randn(2, 3, seed=9).requires_grad_()
    inputs = [cell.weight, cell.bias, x]
    value = fixed_point(cell.bind(x), torch.zeros_like(x), solver=SOLVE, grad=GRADS["anderson"]).value
    first = torch.autograd.grad(value.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(first[2].square().sum(), inputs)
    exact = torch.autograd.grad(newton(*inputs).square().sum(), inputs, create_graph=True)
    expected = torch.autograd.grad(exact[2].square().sum(), inputs)
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_under_autocast_the_second_evaluation_reads_the_weight_again():
    weight, x = torch.eye(3).mul(0.3).requires_grad_(), randn(2, 3, seed=2).float()
    value = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = fixed_point(lambda z: torch.tanh(z @ weight) + x, torch.zeros_like(x), grad=Implicit()).value
        (inside,) = torch.autograd.grad(value.float().sum(), weight, create_graph=True)
    (outside,) = torch.autograd.grad(value.float().sum(), weight, create_graph=True)
    torch.testing.assert_close(inside, outside, rtol=0.05, atol=0.05)
    assert torch.autograd.grad(inside.square().sum(), weight)[0].isfinite().all()


def test_a_part_in_float32_rounds_more_than_the_state():
    """Attention is fused in the forward pass, and not in the second evaluation: float32 apart, in a float64 state."""
    torch.manual_seed(0)
    attend = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        attend.in_proj_weight.mul_(3)
    x = randn(2, 5, 8, seed=1).requires_grad_()

    def f(z: Tensor) -> Tensor:
        state = z.float()
        return torch.tanh(0.5 * attend(state, state, state, need_weights=False)[0].double() + x)

    value = fixed_point(f, torch.zeros_like(x), solver=SOLVE, grad=GRADS["broyden"], on_failure="ignore").value
    (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].isfinite().all()
