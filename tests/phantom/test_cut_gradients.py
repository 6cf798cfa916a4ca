"""Where a graph ends: starts with a graph, maps that ignore their argument, frozen maps, and empty states."""

import pytest
import torch
from torch import Tensor, nn

from phantom import BPTT, DEQ, NPG, UPG, Anderson, Broyden, FixedPoint, Implicit, fixed_point
from tests.phantom.problems import DTYPE, TanhMap, randn

EXACT = 1e-9
SOLVE = FixedPoint(max_steps=500, tol=1e-14)
IMPLICIT = Implicit(solver=Broyden(max_steps=40, tol=1e-12))


@pytest.mark.parametrize("lam", [0.6, 1.0])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_bptt_reaches_its_start(lam, checkpoint, learned):
    """z0 = encoder(x), or a parameter: the truncated iteration depends on where it starts."""
    cell, x = TanhMap(4, seed=1), randn(3, 4, seed=2)
    encoder = nn.Parameter(randn(3, 4, seed=3)) if learned else nn.Linear(4, 4, dtype=DTYPE)
    leaves = [encoder, cell.weight] if learned else [encoder.weight, encoder.bias, cell.weight]
    z0 = encoder * 1 if learned else encoder(x)
    f, z = cell.bind(x), z0
    for _ in range(4):
        z = (1 - lam) * z + lam * f(z)
    cotangent = randn(3, 4, seed=4)
    expected = torch.autograd.grad(z, leaves, cotangent, retain_graph=True)
    value = fixed_point(f, z0, solver=SOLVE, grad=BPTT(num_steps=4, lam=lam, checkpoint=checkpoint)).value
    found = torch.autograd.grad(value, leaves, cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
        assert b.abs().max() > 1e-3


def test_bptt_reaches_every_part_of_a_tuple_start():
    parts = tuple(randn(2, 3, seed=seed).requires_grad_() for seed in (1, 2))

    def f(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.sin(z[0] + z[1]), torch.cos(z[0])

    value = fixed_point(f, parts, solver=SOLVE, grad=BPTT(num_steps=3)).value
    found = torch.autograd.grad(value[0].sum() + value[1].sum(), parts)
    z = parts
    for _ in range(3):
        z = f(z)
    expected = torch.autograd.grad(z[0].sum() + z[1].sum(), parts)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("grad", [UPG(k=3, lam=0.5), NPG(k=3, lam=0.5), IMPLICIT])
def test_an_equilibrium_does_not_depend_on_its_start(grad):
    cell, x, z0 = TanhMap(4, seed=1), randn(3, 4, seed=2), randn(3, 4, seed=3).requires_grad_()
    solution = fixed_point(cell.bind(x), z0, solver=SOLVE, grad=grad)
    found = torch.autograd.grad(solution.value.sum(), [cell.weight, z0], allow_unused=True)
    assert found[0].abs().max() > 0.1 and found[1] is None and solution.z0 is z0


@pytest.mark.parametrize(
    ("grad", "factor"),
    [
        (IMPLICIT, 1.0),
        (Implicit(solver=Anderson(max_steps=9, tol=None)), 1.0),
        (NPG(k=1, lam=1.0), 1.0),
        (NPG(k=1, lam=0.3), 0.3),
        (NPG(k=4, lam=0.3), 1 - 0.7**4),
        (UPG(k=4, lam=0.3), 1 - 0.7**4),
    ],
)
@pytest.mark.parametrize("kind", ["absent", "detached", "no_grad", "one_part", "one_row"])
def test_a_map_that_ignores_its_argument(grad, factor, kind):
    """J = 0 where f ignores z: u = g, and the phantom gradient has the factor 1 - (1 - lam)^k."""
    x = randn(3, 4, seed=5).requires_grad_()
    start = torch.zeros(3, 4, dtype=DTYPE)

    def f(z):
        if kind == "one_part":
            return 0.5 * z[0], x * 2
        if kind == "detached":
            return x * 2 + 0 * z.detach()
        if kind == "no_grad":
            with torch.no_grad():
                nothing = 0 * z
            return x * 2 + nothing
        if kind == "one_row":
            return torch.cat((x[:2] * 2, x[2:] * 2 + 0 * z[2:]))
        return x * 2

    z0 = (start, start) if kind == "one_part" else start
    value = fixed_point(f, z0, solver=SOLVE, grad=grad).value
    g = randn(3, 4, seed=6)
    value = value[1] if kind == "one_part" else value
    (found,) = torch.autograd.grad(value, x, g)
    torch.testing.assert_close(value.detach(), 2 * x.detach(), rtol=EXACT, atol=0)
    torch.testing.assert_close(found, 2 * factor * g, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("grad", [NPG(k=5, lam=0.5), NPG(k=1, lam=1.0), IMPLICIT], ids=str)
def test_a_frozen_map_costs_nothing_in_backward(grad):
    cell, head = TanhMap(4, seed=1).requires_grad_(False), nn.Linear(4, 1, dtype=DTYPE)
    x = randn(3, 4, seed=2)
    solution = fixed_point(cell.bind(x), torch.zeros_like(x), solver=SOLVE, grad=grad)
    assert not solution.value.requires_grad
    torch.testing.assert_close(solution.value, cell.bind(x)(solution.z_star), rtol=0, atol=0)
    head(solution.value).sum().backward()
    assert solution.stats.num_vjps == 0 and solution.stats.adjoint is None
    torch.testing.assert_close(head.weight.grad, solution.value.sum(0, keepdim=True), rtol=EXACT, atol=0)


class _Hidden(torch.autograd.Function):
    """A product whose second factor reaches torch by no ordinary operation."""

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        return z * weight

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        z, weight = ctx.saved_tensors
        return g * weight, (g * z).sum(0)


@pytest.mark.parametrize("grad", [NPG(k=60, lam=1.0), IMPLICIT], ids=str)
@pytest.mark.parametrize("how", ["function", "script", "compiled"])
def test_a_map_that_hides_what_it_reads_is_not_frozen(grad, how):
    weight = torch.tensor([0.5, -0.5, 0.25], dtype=DTYPE, requires_grad=True)
    module = nn.Module()
    if how == "script":
        module = torch.jit.trace(_Scaled(weight), torch.zeros(2, 3, dtype=DTYPE), check_trace=False)
    product = {"function": lambda z: _Hidden.apply(z, weight), "script": module, "compiled": lambda z: z * weight}[how]
    f = torch.compile(lambda z: product(z) + 1, backend="eager") if how == "compiled" else lambda z: product(z) + 1
    parameter = module.weight if how == "script" else weight
    value = fixed_point(f, torch.zeros(2, 3, dtype=DTYPE), solver=SOLVE, grad=grad).value
    (found,) = torch.autograd.grad(value.sum(), parameter)
    torch.testing.assert_close(found, 2 / (1 - weight.detach()) ** 2, rtol=EXACT, atol=EXACT)


class _Scaled(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, z: Tensor) -> Tensor:
        return z * self.weight


@pytest.mark.parametrize("trainable", ["input", "one parameter"])
def test_a_map_frozen_in_part_has_the_rest(trainable):
    cell, x = TanhMap(4, seed=1).requires_grad_(False), randn(3, 4, seed=2)
    leaf = x.requires_grad_() if trainable == "input" else cell.bias.requires_grad_()
    solution = fixed_point(cell.bind(x), torch.zeros(3, 4, dtype=DTYPE), solver=SOLVE, grad=IMPLICIT)
    g = randn(3, 4, seed=3)
    (found,) = torch.autograd.grad(solution.value, leaf, g)
    slope = 1 - (solution.value - x).detach() ** 2
    jacobian = slope[:, :, None] * cell.weight
    u = torch.linalg.solve(torch.eye(4, dtype=DTYPE) - jacobian.mT, g[:, :, None])[:, :, 0]
    torch.testing.assert_close(found, u if trainable == "input" else (u * slope).sum(0), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
@pytest.mark.parametrize("make", [FixedPoint, Anderson, Broyden])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("tol", [1e-6, None])
def test_an_empty_state(make, shape, norm, tol):
    weight = torch.ones(shape[1], shape[1], dtype=DTYPE, requires_grad=True)
    bias = torch.ones(shape[1], dtype=DTYPE, requires_grad=True)
    solver = make(max_steps=4, tol=tol, norm=norm)
    for grad in (Implicit(solver=solver), NPG(k=3, lam=0.5), UPG(k=2, lam=0.5), BPTT(num_steps=2)):
        deq = DEQ(solver=solver, grad=grad)
        solution = deq(lambda z: torch.tanh(z @ weight + bias), torch.zeros(shape, dtype=DTYPE))
        assert solution.value.shape == shape and solution.stats.residual.shape == (shape[0],)
        for gradient in torch.autograd.grad(solution.value.sum(), [weight, bias]):
            assert torch.equal(gradient, torch.zeros_like(gradient))
