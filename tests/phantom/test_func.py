"""torch.func, forward mode and batched gradients against Newton's method, whose derivatives are exact in any order."""

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from phantom import BPTT, DEQ, NPG, SHINE, UPG, Anderson, Broyden, FixedPoint, Implicit, fixed_point
from phantom.diagnostics import exact_adjoint
from tests.phantom.problems import DTYPE, Regression, randn, with_radius

EXACT = 1e-9
WEIGHT, X = with_radius(0.5, 3, seed=1), randn(2, 3, seed=2)
SOLVERS = {
    "broyden": Broyden(max_steps=30, tol=1e-13),
    "anderson": Anderson(max_steps=60, tol=1e-13),
    "plain": FixedPoint(max_steps=100, tol=1e-13),
    "budget": FixedPoint(max_steps=60, tol=None),
}


def equilibrium(weight: Tensor, x: Tensor, *, grad=None, solver=SOLVERS["broyden"]) -> Tensor:
    grad = Implicit(solver=solver) if grad is None else grad
    return fixed_point(lambda z: torch.tanh(z @ weight.mT) + x, torch.zeros_like(x), solver=solver, grad=grad).value


def newton(weight: Tensor, x: Tensor) -> Tensor:
    eye, z = torch.eye(3, dtype=DTYPE), torch.zeros_like(x)
    for _ in range(12):
        hidden = torch.tanh(z @ weight.mT)
        z = z + torch.linalg.solve(eye - (1 - hidden**2)[..., None] * weight, (hidden + x - z)[..., None])[..., 0]
    return z


def loss(solve):
    return lambda weight, x: solve(weight, x).square().sum()


def forward_mode(solve):
    with forward_ad.dual_level():
        value = solve(forward_ad.make_dual(WEIGHT, torch.ones_like(WEIGHT)), X)
        return tuple(forward_ad.unpack_dual(value))


def batched(solve):
    weight = WEIGHT.clone().requires_grad_()
    basis = torch.eye(6, dtype=DTYPE).view(6, 2, 3)
    return torch.autograd.grad(solve(weight, X), weight, basis, is_grads_batched=True)


XS = torch.stack([X, 2 * X, X.flip(0)])
FIRST = {
    "grad": lambda s: func.grad(loss(s), argnums=(0, 1))(WEIGHT, X),
    "vjp": lambda s: func.vjp(s, WEIGHT, X)[1](torch.ones_like(X)),
    "jvp": lambda s: func.jvp(s, (WEIGHT, X), (torch.ones_like(WEIGHT), X.cos())),
    "jacrev": lambda s: func.jacrev(s, argnums=(0, 1))(WEIGHT, X),
    "jacfwd": lambda s: func.jacfwd(s, argnums=(0, 1))(WEIGHT, X),
    "vmap": lambda s: func.vmap(s, (None, 0))(WEIGHT, XS),
    "vmap_of_weights": lambda s: func.vmap(s, (0, None), out_dims=1)(torch.stack([WEIGHT, 0.5 * WEIGHT]), X),
    "vmap_of_last_axis": lambda s: func.vmap(s, (None, 2))(WEIGHT, XS.movedim(0, 2)),
    "vmap_of_vmap": lambda s: func.vmap(func.vmap(s, (None, 0)), (0, None))(torch.stack([WEIGHT, WEIGHT.mT]), XS),
    "per_sample": lambda s: func.vmap(func.grad(loss(s)), (None, 0))(WEIGHT, X[:, None]),
    "grad_of_vmap": lambda s: func.grad(lambda w: func.vmap(s, (None, 0))(w, XS).square().sum())(WEIGHT),
    "jacrev_of_vmap": lambda s: func.jacrev(lambda w: func.vmap(s, (None, 0))(w, XS))(WEIGHT),
    "vmap_of_jacrev": lambda s: func.vmap(func.jacrev(s), (None, 0))(WEIGHT, X[:, None]),
    "forward_mode": forward_mode,
    "is_grads_batched": batched,
}
SECOND = {
    "hessian": lambda s: func.hessian(loss(s), argnums=(0, 1))(WEIGHT, X),
    "reverse_of_reverse": lambda s: func.jacrev(func.jacrev(loss(s)))(WEIGHT, X),
    "reverse_of_forward": lambda s: func.jacrev(func.jacfwd(loss(s)))(WEIGHT, X),
    "forward_of_forward": lambda s: func.jacfwd(func.jacfwd(loss(s)))(WEIGHT, X),
    "force": lambda s: func.grad(lambda w: func.grad(loss(s), argnums=1)(w, X).square().sum())(WEIGHT),
    "autograd_hessian": lambda s: torch.autograd.functional.hessian(lambda w: loss(s)(w, X), WEIGHT),
}


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("transform", FIRST.values(), ids=FIRST)
def test_first_order(transform, solver):
    close(transform(lambda weight, x: equilibrium(weight, x, solver=solver)), transform(newton))


@pytest.mark.parametrize("transform", SECOND.values(), ids=SECOND)
def test_second_order(transform):
    close(transform(equilibrium), transform(newton))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_vectorized_forward_mode_of_autograd(solver):
    def solve(weight: Tensor) -> Tensor:
        return equilibrium(weight, X, solver=solver)

    forward = {"vectorize": True, "strategy": "forward-mode"}
    close(torch.autograd.functional.jacobian(solve, WEIGHT, **forward), func.jacrev(newton)(WEIGHT, X))
    outer = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    found = torch.autograd.functional.hessian(lambda weight: solve(weight).square().sum(), WEIGHT, **outer)
    close(found, func.hessian(loss(newton))(WEIGHT, X))


def test_a_hessian_per_sample():
    """The oracle goes sample by sample: torch's own linalg.solve is wrong in this transform of transforms."""
    found = func.vmap(func.hessian(loss(equilibrium)), (None, 0))(WEIGHT, X[:, None])
    close(found, torch.stack([func.hessian(loss(newton))(WEIGHT, x) for x in X[:, None]]))


def test_the_third_order():
    def third(solve) -> Tensor:
        inner = func.grad(loss(solve), argnums=1)
        middle = func.grad(lambda w: inner(w, X).square().sum())
        return func.grad(lambda w: middle(w).sum())(WEIGHT)

    torch.testing.assert_close(third(equilibrium), third(newton), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("grad", "k", "lam"), [(NPG(k=4, lam=0.5), 4, 0.5), (UPG(k=4, lam=0.5), 4, 0.5), (NPG(k=1, lam=1.0), 1, 1.0)]
)
def test_phantom_gradients_are_the_neumann_sum(grad, k, lam):
    """u = lam sum (B^T)^i g by dense matrices, in reverse; and its transpose in forward mode."""
    g, tangent = randn(2, 3, seed=3), randn(2, 3, seed=4)
    jacobian = (1 - torch.tanh(newton(WEIGHT, X) @ WEIGHT.mT) ** 2)[:, :, None] * WEIGHT
    damped = lam * jacobian + (1 - lam) * torch.eye(3, dtype=DTYPE)
    total = lam * sum(torch.linalg.matrix_power(damped, i) for i in range(k))
    (found,) = func.vjp(lambda x: equilibrium(WEIGHT, x, grad=grad), X)[1](g)
    close(found, torch.einsum("bij,bi->bj", total, g))
    _, moved = func.jvp(lambda x: equilibrium(WEIGHT, x, grad=grad), (X,), (tangent,))
    close(moved, torch.einsum("bij,bj->bi", total, tangent))


@pytest.mark.parametrize("grad", [Implicit(), NPG(), UPG(), SHINE()], ids=["implicit", "npg", "upg", "shine"])
@pytest.mark.parametrize("name", ["grad", "vjp", "jvp", "jacrev", "vmap", "per_sample"])
def test_nothing_holds_a_graph_that_nobody_asked_for(grad, name):
    """As with torch.func of plain code: else w - 0.1 * func.grad(loss)(w) has a graph that grows with every step."""
    if isinstance(grad, SHINE) and name == "jvp":
        pytest.skip("SHINE has no forward mode")
    found = FIRST[name](lambda weight, x: equilibrium(weight, x, grad=grad))
    assert not any(t.requires_grad for t in pytree.tree_leaves(found))


def test_bptt_is_the_loop():
    def loop(weight: Tensor, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(3):
            z = torch.tanh(z @ weight.mT) + x
        return z

    for transform in (FIRST["jacrev"], FIRST["jvp"], FIRST["per_sample"], SECOND["hessian"]):
        close(transform(lambda weight, x: equilibrium(weight, x, grad=BPTT(num_steps=3))), transform(loop))


def test_checkpointing_is_refused_under_torch_func():
    with pytest.raises(RuntimeError, match="use checkpoint=False there"):
        FIRST["grad"](lambda weight, x: equilibrium(weight, x, grad=UPG(checkpoint=True)))


def test_shine_has_the_gradient_of_autograd():
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(equilibrium(WEIGHT, x, grad=SHINE()).square().sum(), x)[0]
    close(func.grad(lambda x: equilibrium(WEIGHT, x, grad=SHINE()).square().sum())(X), expected)


@pytest.mark.parametrize("grad", [NPG(k=3, lam=0.5), NPG(k=1, lam=1.0)], ids=str)
@pytest.mark.parametrize("name", ["hessian", "reverse_of_reverse", "reverse_of_forward", "force"])
def test_estimates_refuse_a_second_derivative(grad, name):
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        SECOND[name](lambda weight, x: equilibrium(weight, x, grad=grad))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_functional_call(solver):
    """Parameters of a module that need grad outside, too: per-sample gradients sum to the gradient of the sum."""
    model, x = Regression(DEQ(solver=solver, grad=Implicit(solver=solver))), randn(4, 3, seed=5)
    parameters = dict(model.named_parameters())

    def one(parameters, x: Tensor) -> Tensor:
        return func.functional_call(model, parameters, (x[None],)).square().sum()

    each = func.vmap(func.grad(one), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        close(each[name].detach().sum(0), parameter.grad)
        assert each[name].shape == (4, *parameter.shape)


def test_a_tuple_state_and_frozen_weights():
    def pair(x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        value = fixed_point(
            lambda z: (torch.tanh(z[0] @ WEIGHT.mT) + z[1], x),
            (zeros, zeros),
            solver=SOLVERS["broyden"],
            grad=Implicit(solver=SOLVERS["broyden"]),
        ).value
        return value[0]

    for transform in (func.jacrev, func.jacfwd, lambda f: func.vmap(func.jacrev(f))):
        x = X if transform in (func.jacrev, func.jacfwd) else XS
        close(transform(pair)(x), transform(lambda x: newton(WEIGHT, x))(x))


def test_rows_of_a_vmap_stop_alone():
    """Two scales of one map in one vmap: each instance takes the steps that it takes alone."""
    scales, evaluations = torch.tensor([0.1, 0.9], dtype=DTYPE), []

    def solve(scale: Tensor) -> Tensor:
        solution = fixed_point(
            lambda z: scale * z + 1,
            torch.zeros(1, 1, dtype=DTYPE),
            solver=FixedPoint(max_steps=400, tol=1e-10),
            grad=UPG(k=1, lam=1.0),
        )
        evaluations.append(solution.stats.num_steps)
        return solution.z_star

    close(func.vmap(solve)(scales)[:, 0, 0], 1 / (1 - scales))
    together = evaluations.pop()
    for scale in scales:
        solve(scale)
    assert together.flatten().tolist() == [int(steps) for steps in evaluations]


def test_a_transform_inside_f():
    """f is itself a gradient: the equilibrium of z = x - 0.3 grad E(z), whose Jacobian is -0.3 times a Hessian."""
    x = X.clone().requires_grad_()
    energy = func.vmap(func.grad(lambda z: (z @ WEIGHT @ z).sin()))
    grad = Implicit(solver=SOLVERS["broyden"])
    value = fixed_point(lambda z: x - 0.1 * energy(z), torch.zeros_like(X), solver=SOLVERS["broyden"], grad=grad).value
    g = randn(2, 3, seed=6)
    jacobian = -0.1 * func.vmap(func.hessian(lambda z: (z @ WEIGHT @ z).sin()))(value.detach())
    close(torch.autograd.grad(value, x, g)[0], exact_adjoint(jacobian, g))


def test_no_grad_around_a_transform_is_refused_in_a_sentence():
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs grad around it"):
        func.grad(loss(equilibrium))(WEIGHT, X)


@pytest.mark.parametrize("tol", [1e-6, None])
def test_linearize_is_refused_in_a_sentence(tol):
    def solve(x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.sin(z @ WEIGHT) + x, torch.zeros_like(x), solver=Broyden(tol=tol)).value

    with pytest.raises(RuntimeError, match=r"use torch\.func\.jvp"):
        func.linearize(solve, X)


def test_a_vectorised_hessian_of_autograd():
    def hessian(solve) -> Tensor:
        return torch.autograd.functional.hessian(lambda w: loss(solve)(w, X), WEIGHT, vectorize=solve is equilibrium)

    close(hessian(equilibrium), hessian(newton))


def test_a_batched_gradient_with_a_graph_is_refused_in_a_sentence():
    weight = WEIGHT.clone().requires_grad_()
    basis = torch.eye(6, dtype=DTYPE).view(6, 2, 3)
    with pytest.raises(RuntimeError, match="around the whole model"):
        torch.autograd.grad(equilibrium(weight, X), weight, basis, is_grads_batched=True, create_graph=True)


def tangent(solve):
    """Return the tangent of a dual number, with its graph."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(solve(forward_ad.make_dual(X, X.cos()))).tangent


INNER = {
    "grad": lambda s: func.grad(lambda x: s(x).square().sum())(X),
    "per_sample": lambda s: func.vmap(func.grad(lambda x: s(x[None]).square().sum()))(X),
    "jacrev": lambda s: func.jacrev(s)(X),
    "jvp": lambda s: func.jvp(s, (X,), (X.cos(),))[1],
    "dual": tangent,
}


@pytest.mark.parametrize("name", INNER)
def test_autograd_around_a_transform_is_one_more_order(name):
    """As a penalty of a gradient by the input is trained: the weights are those of a module, and no argument."""
    found = []
    for solve in (equilibrium, newton):
        weight = WEIGHT.clone().requires_grad_()
        inner = INNER[name](lambda x, solve=solve, weight=weight: solve(2 * weight / 2, x))
        found.append(torch.autograd.grad(inner.square().sum(), weight)[0])
    close(*found)


def test_what_vjp_returns_is_not_differentiated_by_backward():
    weight = WEIGHT.clone().requires_grad_()
    (pulled,) = func.vjp(lambda x: equilibrium(weight, x), X)[1](X)
    with pytest.raises(RuntimeError, match="each order is a transform of its own, and autograd around"):
        pulled.sum().backward()


@pytest.mark.parametrize("grad", [None, UPG(k=3), NPG(k=3), BPTT(num_steps=3)], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forward_mode_needs_grad_and_vmap_does_not(grad, mode):
    with mode():
        for name in ("jvp", "jacfwd"):
            # torch 2.11 itself refuses jacfwd in inference mode, before it calls anything
            with pytest.raises(RuntimeError, match=r"forward mode differentiates under|aten::_make_dual"):
                FIRST[name](lambda weight, x: equilibrium(weight, x, grad=grad))
        assert FIRST["vmap"](lambda weight, x: equilibrium(weight, x, grad=grad)).shape == XS.shape


def nested(weight: Tensor, x: Tensor, *, grad) -> Tensor:
    """Return the equilibrium of a map that solves another one inside."""

    def f(z: Tensor) -> Tensor:
        return torch.tanh(0.5 * equilibrium(weight, 0.5 * z + x, grad=grad)) + x

    return fixed_point(
        f, torch.zeros_like(x), solver=SOLVERS["broyden"], grad=grad or Implicit(solver=SOLVERS["broyden"])
    ).value


@pytest.mark.parametrize("grad", [None, UPG(k=60, lam=1.0)], ids=["implicit", "upg"])
def test_a_solve_inside_f_in_forward_mode(grad):
    step, direction = 1e-6, X.cos()
    ends = [nested(WEIGHT, X + sign * step * direction, grad=grad).detach() for sign in (1, -1)]
    found = func.jvp(lambda x: nested(WEIGHT, x, grad=grad), (X,), (direction,))[1]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=1e-8)
    hessian = func.hessian(lambda x: nested(WEIGHT, x, grad=grad).square().sum())(X)
    assert hessian.isfinite().all() and hessian.abs().sum() > 0


def test_f_may_have_a_forward_mode_of_its_own():
    def f(z: Tensor) -> Tensor:
        return 0.3 * func.jvp(torch.tanh, (z,), (torch.ones_like(z),))[1] + X

    def solve(x: Tensor) -> Tensor:
        return fixed_point(lambda z: f(z) * x, torch.zeros_like(X), grad=Implicit()).value

    close(func.vmap(solve)(torch.ones(2, dtype=DTYPE)), torch.stack([solve(torch.ones((), dtype=DTYPE))] * 2))


@pytest.mark.parametrize(("name", "solves"), [("jvp", 1), ("grad", 1)])
def test_weights_that_need_no_grad_cost_no_further_solve(name, solves):
    for weight, more in ((WEIGHT, 0), (WEIGHT.clone().requires_grad_(), 1)):
        seen = []

        class Counted(Implicit):
            def cotangent(self, vjp, g, stats, history, seen=seen):
                seen.append(len(g))
                return super().cotangent(vjp, g, stats, history)

        grad = Counted(solver=SOLVERS["broyden"])
        INNER[name](lambda x, weight=weight, grad=grad: equilibrium(weight, x, grad=grad))
        assert len(seen) == solves + more


@pytest.mark.parametrize("transform", [func.grad, func.hessian])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_all_evaluations_under_a_transform_are_counted(transform, needs_grad):
    weight, found = WEIGHT.clone().requires_grad_(needs_grad), []

    def value(x: Tensor) -> Tensor:
        calls: list[None] = []

        def f(z: Tensor) -> Tensor:
            calls.append(None)
            return torch.tanh(z @ weight.mT) + x

        solution = fixed_point(f, torch.zeros_like(x), grad=Implicit(solver=SOLVERS["broyden"]))
        found.append((solution.stats.num_evals, len(calls)))
        return solution.value.square().sum()

    transform(value)(X)
    assert [counted for counted, _ in found] == [calls for _, calls in found] != []


def test_shine_serves_cotangents_alone_and_several_of_them():
    x = X.clone().requires_grad_()
    value = equilibrium(WEIGHT, x, grad=SHINE())
    rows = [
        torch.autograd.grad(value, x, basis, retain_graph=True)[0] for basis in torch.eye(6, dtype=DTYPE).view(6, 2, 3)
    ]
    close(func.jacrev(lambda x: equilibrium(WEIGHT, x, grad=SHINE()))(X), torch.stack(rows).view(2, 3, 2, 3))
    with pytest.raises(RuntimeError, match="as SHINE does, has no forward mode"):
        func.jvp(lambda x: equilibrium(WEIGHT, x, grad=SHINE()), (X,), (X.cos(),))


def test_images_with_channels_last_have_per_sample_gradients():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=DTYPE)
    images = randn(2, 3, 5, 5, seed=4)

    def total(x: Tensor) -> Tensor:
        solver = SOLVERS["plain"]
        f = lambda z: 0.3 * torch.tanh(convolution(z)) + x[None]  # noqa: E731
        return fixed_point(f, torch.zeros_like(x[None]), solver=solver, grad=Implicit(solver=solver)).value.sum()

    found = func.vmap(func.grad(total))(images.contiguous(memory_format=torch.channels_last))
    close(found, torch.stack([func.grad(total)(image) for image in images]))
