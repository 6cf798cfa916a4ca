"""torch.compile of a model with a DEQ inside: the numbers of eager, one graph break per solve, the map compiled."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from phantom import BPTT, DEQ, NPG, SHINE, UPG, Broyden, FixedPoint, Implicit, OneStep, fixed_point
from tests.phantom.problems import DTYPE, TanhMap, randn

SAME = 1e-12
GRADS = {
    "upg": UPG(k=3, lam=0.5),
    "upg_checkpoint": UPG(k=3, lam=0.5, checkpoint=True),
    "npg": NPG(k=3, lam=0.5),
    "implicit": Implicit(solver=Broyden(max_steps=20, tol=1e-11)),
    "implicit_fixed": Implicit(solver=FixedPoint(max_steps=9, tol=None)),
    "shine": SHINE(),
    "bptt": BPTT(num_steps=4),
}


class Backend:
    """Compile nothing, and count the graphs and the calls of tanh in them."""

    def __init__(self) -> None:
        self.graphs, self.tanh = 0, 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]):
        self.graphs += 1
        self.tanh += sum("tanh" in str(node.target) for node in module.graph.nodes)
        return module.forward


class Model(nn.Module):
    """Encoder, two equilibria one after the other by one cell, head."""

    def __init__(self, deq: DEQ, *, solves: int = 1, parts: int = 1) -> None:
        super().__init__()
        self.encoder, self.cell, self.head = nn.Linear(3, 4), TanhMap(4, seed=1), nn.Linear(4, 2)
        self.deq, self.solves, self.parts = deq, solves, parts
        self.double()
        with torch.no_grad():
            for i, parameter in enumerate([*self.encoder.parameters(), *self.head.parameters()]):
                parameter.copy_(randn(*parameter.shape, seed=10 + i))

    def forward(self, x: Tensor) -> Tensor:
        z = self.solve(self.encoder(x))
        if self.solves == 2:
            z = self.solve(z)
        return self.head(z)

    def solve(self, x: Tensor) -> Tensor:
        f, start = self.cell.bind(x), torch.zeros_like(x)
        if self.parts == 1:
            return self.deq(f, start).value
        pair = self.deq(lambda z: tuple(f(torch.cat(z, 1)).split([1, 3], 1)), tuple(start.split([1, 3], 1)))
        return torch.cat(pair.value, 1)


def outcome(model: nn.Module, call, x: Tensor) -> list[Tensor]:
    value = call(x)
    return [value.detach(), *torch.autograd.grad(value.square().sum(), list(model.parameters()))]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("tol", [1e-11, None])
def test_a_compiled_model_has_the_numbers_of_eager(grad, tol):
    model, backend = Model(DEQ(solver=Broyden(max_steps=12, tol=tol), grad=grad)), Backend()
    compiled = torch.compile(model, backend=backend)
    for seed in (1, 2):
        x = randn(5, 3, seed=seed)
        for a, b in zip(outcome(model, compiled, x), outcome(model, model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)
    # one where the model calls its method, and one where that calls the solve
    assert sum(counters["graph_break"].values()) == (0 if isinstance(grad, BPTT) else 2)
    assert backend.tanh == (4 if isinstance(grad, BPTT) else 1), "f is compiled once, and not its solve"
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=SAME, atol=SAME)


@pytest.mark.parametrize("name", ["upg", "implicit"])
@pytest.mark.parametrize(("solves", "parts"), [(2, 1), (1, 2)])
def test_several_solves_and_parts(name, solves, parts):
    model = Model(DEQ(solver=Broyden(max_steps=12, tol=1e-11), grad=GRADS[name]), solves=solves, parts=parts)
    compiled, x = torch.compile(model, backend=Backend()), randn(5, 3, seed=1)
    for a, b in zip(outcome(model, compiled, x), outcome(model, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)
    assert sum(counters["graph_break"].values()) <= 2 * solves


def test_all_estimators_in_one_process():
    """Their classes, with and without grad, are more than torch recompiles one piece of code for."""
    for grad in (*GRADS.values(), OneStep()):
        model, x = Model(DEQ(solver=Broyden(max_steps=5, tol=None), grad=grad)), randn(5, 3, seed=1)
        compiled = torch.compile(model, backend="eager")
        for a, b in zip(outcome(model, compiled, x), outcome(model, model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=SAME, atol=SAME)


def test_many_settings_in_one_process():
    """More solvers and estimators than torch recompiles one piece of code for."""
    for i in range(12):
        model = Model(DEQ(solver=Broyden(max_steps=5 + i, tol=None), grad=NPG(k=1 + i, lam=0.5)))
        compiled, x = torch.compile(model, backend="eager"), randn(5, 3, seed=1)
        for a, b in zip(outcome(model, compiled, x), outcome(model, model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("name", ["upg", "npg", "implicit"])
def test_the_default_backend(name):
    model = Model(DEQ(solver=FixedPoint(max_steps=30, tol=1e-9), grad=GRADS[name]))
    compiled, x = torch.compile(model, backend="aot_eager"), randn(5, 3, seed=1)
    for a, b in zip(outcome(model, compiled, x), outcome(model, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)


def test_a_bare_call_and_a_second_derivative():
    cell, x = TanhMap(4, seed=1), randn(5, 4, seed=2).requires_grad_()

    def force(x: Tensor) -> Tensor:
        return fixed_point(
            cell.bind(x), torch.zeros_like(x), solver=Broyden(max_steps=30, tol=1e-13), grad=GRADS["implicit"]
        ).value.sin()

    results = []
    for call in (force, torch.compile(force, backend="eager")):
        first = torch.autograd.grad(call(x).sum(), x, create_graph=True)[0]
        results.append((first, *torch.autograd.grad(first.square().sum(), [x, cell.weight])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("name", ["npg", "implicit"])
@pytest.mark.parametrize("way", ["autograd", "func"])
def test_the_backward_inside_compiled_code_runs_eagerly(name, way):
    """As in a whole training step; compiled line by line it takes a minute once, and each step 60 times as long."""
    model, x = Model(DEQ(solver=FixedPoint(max_steps=30, tol=1e-9), grad=GRADS[name])), randn(5, 3, seed=1)

    def step(x: Tensor) -> list[Tensor]:
        if way == "func":
            return [torch.func.grad(lambda x: model(x).square().sum())(x)]
        return outcome(model, model, x)

    traced = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]):
        traced.extend(str(node.meta.get("stack_trace")) for node in module.graph.nodes)
        return module.forward

    for a, b in zip(torch.compile(step, backend=backend)(x), step(x), strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)
    assert bool(traced) == (way == "autograd") and not any("phantom/gradient" in lines for lines in traced)


def test_fullgraph_of_an_unrolled_iteration():
    model, backend = Model(DEQ(solver=FixedPoint(max_steps=9, tol=None), grad=GRADS["bptt"])), Backend()
    compiled, x = torch.compile(model, backend=backend, fullgraph=True), randn(5, 3, seed=1)
    for a, b in zip(outcome(model, compiled, x), outcome(model, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)
    assert backend.graphs == 1 and backend.tanh == 4


@pytest.mark.parametrize("tol", [1e-3, None])
def test_fullgraph_of_a_solve_is_refused_in_a_sentence(tol):
    model = Model(DEQ(solver=FixedPoint(max_steps=9, tol=tol), grad=GRADS["upg"]))
    with pytest.raises(Exception, match="fullgraph=True refuses"):
        torch.compile(model, backend="eager", fullgraph=True)(randn(5, 3, seed=1))


def test_a_compiled_map_inside_a_compiled_model():
    model, backend = Model(DEQ(solver=FixedPoint(max_steps=9, tol=None), grad=GRADS["implicit"])), Backend()
    x = randn(5, 3, seed=1)
    expected = outcome(model, model, x)
    bind = model.cell.bind
    model.cell.bind = lambda x: torch.compile(bind(x), backend=backend)
    for a, b in zip(outcome(model, torch.compile(model, backend=backend), x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)
    assert backend.tanh == 1


def test_the_value_does_not_carry_the_compiler_s_dtype():
    model = Model(DEQ(solver=FixedPoint(max_steps=9, tol=None), grad=GRADS["npg"])).float()
    x = randn(5, 3, seed=1).float()
    assert torch.compile(model, backend="eager")(x).dtype == torch.float32 != DTYPE
