"""Products with the Jacobian of a compiled cell: exact, of z alone, compiled once, and counted."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from phantom import NPG, Broyden, Implicit, fixed_point
from tests.phantom.problems import DTYPE, randn

DIM, BATCH = 4, 3
SOLVER = Broyden(max_steps=60, tol=1e-13)
EXACT = Implicit(solver=SOLVER)


class Cell(nn.Module):
    """tanh(0.3 W z + c s x), which reads a weight, a buffer and what it is bound to."""

    c: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(DIM, DIM, seed=1))
        self.register_buffer("c", torch.tensor(0.7, dtype=DTYPE))

    def forward(self, z: Tensor, *, bound: tuple[Tensor, Tensor]) -> Tensor:
        x, scale = bound
        return torch.tanh(0.3 * z @ self.weight.T + self.c * scale * x)


class Backend:
    """Compile nothing; keep the number of gradients that the backward of each graph computes."""

    def __init__(self) -> None:
        self.gradients: list[int] = []
        self._compile = aot_autograd(
            fw_compiler=lambda module, _: make_boxed_func(module.forward), bw_compiler=self._keep
        )

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        return self._compile(module, inputs)

    def _keep(self, module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        (output,) = module.graph.find_nodes(op="output")
        self.gradients.append(sum(gradient is not None for gradient in output.args[0]))
        return make_boxed_func(module.forward)


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def compiled(backend: Backend) -> Cell:
    cell = Cell()
    cell.compile(fullgraph=True, dynamic=False, backend=backend)
    return cell


def step(cell: Cell, grad, *, seed: int, hide: bool = False) -> list[Tensor]:
    """Return the gradients of a loss: those of the weight, the input and the scale."""
    x, scale = randn(BATCH, DIM, seed=seed).requires_grad_(), randn(DIM, seed=seed + 1).requires_grad_()
    f = partial(cell, bound=(x, 2 * scale))
    solution = fixed_point((lambda z: f(z)) if hide else f, randn(BATCH, DIM, seed=9), solver=SOLVER, grad=grad)
    return list(torch.autograd.grad(solution.value.square().sum(), [cell.weight, x, scale]))


def dense(cell: Cell, *, seed: int) -> list[Tensor]:
    """Return the same by a dense solve of (I - J^T) u = g."""
    x, scale = randn(BATCH, DIM, seed=seed).requires_grad_(), randn(DIM, seed=seed + 1).requires_grad_()
    z = torch.zeros(BATCH, DIM, dtype=DTYPE)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(400):
            z = cell(z, bound=(x, 2 * scale)).detach()
        matrix = torch.autograd.functional.jacobian(lambda z: cell(z, bound=(x, 2 * scale)), z)
        size = z.numel()
        u = torch.linalg.solve(torch.eye(size, dtype=DTYPE) - matrix.reshape(size, size).T, 2 * z.flatten())
        return list(torch.autograd.grad(cell(z, bound=(x, 2 * scale)), [cell.weight, x, scale], u.view_as(z)))


def test_the_backward_of_a_product_computes_one_gradient_and_is_compiled_once(backend):
    cell = compiled(backend)
    for seed in (2, 4, 6):
        for found, expected in zip(step(cell, EXACT, seed=seed), dense(cell, seed=seed), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert backend.gradients == [1]
        with torch.no_grad():
            cell.weight.mul_(0.9)
    assert cell.weight.grad is None and cell.weight.requires_grad and isinstance(cell.weight, nn.Parameter)


class Closed(nn.Module):
    """The cell with an input of its own, on a state of one part or of two."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.x = Cell(), nn.Parameter(randn(BATCH, DIM, seed=2))

    def forward(self, z: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, ...]:
        whole = z if isinstance(z, Tensor) else torch.cat(z, 1)
        out = self.cell(whole, bound=(self.x, torch.ones(DIM, dtype=DTYPE)))
        return out if isinstance(z, Tensor) else out.split([1, DIM - 1], 1)


@pytest.mark.parametrize("way", ["module", "wrapped"])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_way_to_compile_a_module_and_every_state(backend, way, parts):
    def gradients(model: nn.Module, own: nn.Module) -> list[Tensor]:
        start = torch.zeros(BATCH, DIM, dtype=DTYPE)
        z0 = start if parts == 1 else start.split([1, DIM - 1], 1)
        value = fixed_point(model, z0, solver=SOLVER, grad=EXACT).value
        loss = sum(part.square().sum() for part in ((value,) if parts == 1 else value))
        return list(torch.autograd.grad(loss, list(own.parameters())))

    expected, model = gradients(plain := Closed(), plain), Closed()
    if way == "module":
        model.compile(backend=backend)
    found = gradients(model if way == "module" else torch.compile(model, backend=backend), model)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert backend.gradients == [parts], "of each part of the state, and of no weight"


class Shared(nn.Module):
    """A cell that holds one part under two names, and one weight in two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fast = nn.Linear(DIM, DIM, dtype=DTYPE)
        self.slow = self.fast
        self.other = nn.Linear(DIM, DIM, dtype=DTYPE)
        self.tied = nn.Linear(DIM, DIM, dtype=DTYPE)
        self.tied.weight = self.other.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.3)
        self.x = nn.Parameter(randn(BATCH, DIM, seed=2))

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.slow(self.fast(z)) + self.other(z) + self.tied(z) + self.x)


@pytest.mark.parametrize("grad", [EXACT, NPG(k=3)], ids=["implicit", "npg"])
def test_shared_parts_go_on_training(backend, grad):
    plain, cell = Shared(), Shared()
    cell.compile(fullgraph=True, dynamic=False, backend=backend)
    before = dict(cell.named_parameters(remove_duplicate=False))
    for _ in range(2):
        for f in (plain, cell):
            f.zero_grad()
            z0 = torch.zeros(BATCH, DIM, dtype=DTYPE)
            fixed_point(f, z0, solver=SOLVER, grad=grad).value.square().sum().backward()
        assert dict(cell.named_parameters(remove_duplicate=False)).keys() == before.keys()
        for name, parameter in cell.named_parameters(remove_duplicate=False):
            assert parameter is before[name], name
        for (name, a), b in zip(plain.named_parameters(), cell.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("k", [1, 4])
def test_the_neumann_sum_is_that_of_eager_code(backend, k):
    grad, cell = NPG(k=k, lam=0.6), compiled(backend)
    for found, expected in zip(step(cell, grad, seed=2), step(Cell(), grad, seed=2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert backend.gradients == [1] * (k > 1), "one term has no product"


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("grad", [NPG(k=3), EXACT], ids=["npg", "implicit"])
def test_the_number_of_problems_may_change(dynamic, grad):
    """The last batch of an epoch is smaller: torch then compiles for any size, and its backward asks again."""
    torch._dynamo.reset()
    cell, plain = Cell(), Cell()
    cell.compile(backend="aot_eager", dynamic=dynamic)
    for size in (4, 3, 4, 2):
        found = []
        for each in (cell, plain):
            f = partial(each, bound=(randn(size, DIM, seed=2), torch.ones(DIM, dtype=DTYPE)))
            value = fixed_point(f, torch.zeros(size, DIM, dtype=DTYPE), solver=SOLVER, grad=grad).value
            found += torch.autograd.grad(value.square().sum(), each.weight)
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()


def test_a_closure_hides_the_module_and_runs_eagerly(backend):
    cell = compiled(backend)
    for found, expected in zip(step(cell, EXACT, seed=2, hide=True), dense(cell, seed=2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert backend.gradients == []


def test_a_second_derivative_is_that_of_eager_code(backend):
    def penalty(cell: Cell) -> Tensor:
        x = randn(BATCH, DIM, seed=2).requires_grad_()
        bound = (x, torch.ones(DIM, dtype=DTYPE))
        value = fixed_point(partial(cell, bound=bound), torch.zeros_like(x), solver=SOLVER, grad=EXACT).value
        (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), cell.weight)
        return second

    torch.testing.assert_close(penalty(compiled(backend)), penalty(Cell()), rtol=1e-8, atol=1e-10)


def test_the_extra_evaluation_is_counted(backend):
    cell = compiled(backend)
    x = randn(BATCH, DIM, seed=2)
    f = partial(cell, bound=(x, torch.ones(DIM, dtype=DTYPE)))
    solution = fixed_point(f, torch.zeros_like(x), solver=SOLVER, grad=NPG(k=4))
    before = solution.stats.num_evals
    solution.value.sum().backward()
    assert solution.stats.num_evals == before + 1 and solution.stats.num_vjps == 3
