"""IGNN: parameter counts, the projected contraction, exact gradients on a directed graph, odd graphs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.graphs.graph import Graph, membership, normalized_adjacency, sparse_matrix, spectral_radius
from models.ignn.layers import ImplicitGraphLayer, SpectralGraphLayer, project_rows
from models.ignn.model import ChainsIGNN, NodeIGNN, solve
from models.ignn.sparse import multiply
from models.official.load import load_reference
from phantom import NPG, UPG, JacobianRegularizer
from phantom.diagnostics import dense_jacobian, exact_adjoint
from phantom.engine.model import parameter_counts
from tests.models.graph_models import EXACT, deq, directed_graph, graph_model, make_layer, node_model, ones, randn


@pytest.mark.parametrize(
    ("in_features", "total", "dead"), [(35, 37_634, 10_624), (3, 33_538, 8_576)], ids=["COX2", "PROTEINS"]
)
def test_parameters_of_graph_classification(in_features, total, dead):
    model = graph_model(hidden=64, num_layers=3, in_features=in_features, num_classes=2)
    groups = parameter_counts(model)
    assert sum(p.numel() for p in model.parameters()) == sum(groups.values()) == total
    assert groups["dead"] == dead and groups["hidden"] == 4_160 and groups["classifier"] == 130
    alive = graph_model(hidden=64, num_layers=3, in_features=in_features, num_classes=2, layer=make_layer(dead=False))
    assert sum(p.numel() for p in alive.parameters()) == total - dead


def test_parameters_of_node_labelling():
    widths = {"widths": [1024, 512, 512, 256], "in_features": 50, "num_labels": 121, "deq": deq()}
    with torch.device("meta"):
        model = NodeIGNN(layer=make_layer(), **widths)
        spectral = NodeIGNN(layer=make_layer(SpectralGraphLayer), **widths)
    assert sum(p.numel() for p in model.parameters()) == 4_656_931
    assert parameter_counts(model)["dead"] == 1_002_105
    assert sum(p.numel() for p in spectral.parameters()) == 4_664_206


def test_parameters_of_chains():
    model = ChainsIGNN(hidden=16, dropout=0.5, layer=make_layer(), in_features=100, num_classes=2, deq=deq())
    assert parameter_counts(model) == {"layers": 1_856, "dead": 1_616, "classifier": 32}


def test_projection_is_the_nearest_point():
    """Against the threshold found by bisection: rows outside are cut to the ball, rows inside are untouched."""
    weight, radius = randn(40, 12) * torch.linspace(0.01, 3, 40, dtype=torch.float64)[:, None], 1.7
    low, high = torch.zeros(40, 1, dtype=torch.float64), weight.abs().amax(dim=1, keepdim=True)
    for _ in range(100):
        theta = (low + high) / 2
        above = (weight.abs() - theta).clamp_min(0).sum(dim=1, keepdim=True) > radius
        low, high = torch.where(above, theta, low), torch.where(above, high, theta)
    outside = weight.abs().sum(dim=1, keepdim=True) > radius
    expected = torch.where(outside, weight.sign() * (weight.abs() - high).clamp_min(0), weight)
    projected = project_rows(weight, radius)
    assert 0 < outside.sum() < 40
    assert (projected - expected).abs().max() < 1e-12
    assert torch.equal(projected[~outside[:, 0]], weight[~outside[:, 0]])


@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_product(transposed):
    matrix = directed_graph(7).adjacency
    dense = matrix.to_dense().T if transposed else matrix.to_dense()
    x = randn(7, 3).requires_grad_()
    assert (multiply(matrix, x, transposed=transposed) - dense @ x).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x: multiply(matrix, x, transposed=transposed), x)
    assert torch.autograd.gradgradcheck(lambda x: multiply(matrix, x, transposed=transposed).square(), x)


def test_exact_gradient_on_a_directed_graph():
    """Against a dense Jacobian and a linear solve, where A and A^T must not be confused."""
    graph = directed_graph()
    layer = make_layer()(in_features=4, features=3).double()
    injection = layer.inject(graph.features, graph)
    solution = solve(deq(), layer, injection, injection, graph)
    g = randn(1, 9, 3, seed=5)
    (solution.value * g).sum().backward()
    f = layer.eval().bind(injection.detach(), graph)
    adjoint = exact_adjoint(dense_jacobian(f, solution.z_star), g.reshape(1, -1)).reshape(9, 3)
    state, a = solution.z_star[0], graph.adjacency.to_dense()
    pre = a.T @ state @ layer.W.detach().T + injection.detach()
    assert (state - pre.relu()).abs().max() < 1e-12
    through = adjoint * (pre > 0)
    assert (layer.W.grad - through.T @ (a.T @ state)).abs().max() < 1e-10
    assert (layer.omega_1.grad - through.T @ (a.T @ graph.features)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", [ImplicitGraphLayer, SpectralGraphLayer])
@pytest.mark.parametrize("training", [True, False])
def test_the_map_contracts_however_large_the_weights(kind, training):
    graph = directed_graph(nodes=12)
    layer = make_layer(kind, kappa=0.98)(in_features=4, features=5).double().train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(50)
    f = layer.bind(layer.inject(graph.features, graph).detach(), graph)
    jacobian = dense_jacobian(f, randn(1, 12, 5).abs())[0]
    assert torch.linalg.eigvals(jacobian).abs().max() <= 0.98 + 1e-9


def test_evaluation_projects_without_touching_the_stored_weight():
    graph = directed_graph()
    layer = make_layer()(in_features=4, features=5).double()
    with torch.no_grad():
        layer.W.mul_(10)
    before = layer.W.detach().clone()
    injection = layer.inject(graph.features, graph).detach()
    x = randn(1, 9, 5).abs()
    evaluated = layer.eval().bind(injection, graph)(x)
    assert torch.equal(layer.W, before)
    trained = layer.train().bind(injection, graph)(x)
    assert torch.equal(layer.W, project_rows(before, 0.9 / graph.radius)) and not torch.equal(layer.W, before)
    assert torch.equal(evaluated, trained)


def test_evaluation_has_the_gradient_of_training():
    graph, gradients = directed_graph(), []
    for training in (False, True):
        model = graph_model().train(training)
        with torch.no_grad():
            model.layers[0].W.mul_(10)
        logits, _ = model(graph)
        logits.square().sum().backward()
        gradients.append(model.layers[0].W.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [ImplicitGraphLayer, SpectralGraphLayer])
def test_two_forwards_before_one_backward(kind):
    """The second forward projects onto another ball and takes a power step: the first's backward must not see it."""
    graphs = [directed_graph(seed=0), directed_graph(seed=7)]
    layer = make_layer(kind)(in_features=4, features=5).double()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = randn(1, 9, 5).abs()

    def first() -> Tensor:
        layer.load_state_dict(state)
        layer.zero_grad()
        return layer.bind(layer.inject(graphs[0].features, graphs[0]), graphs[0])(x).square().sum()

    first().backward()
    expected = [p.grad for p in layer.parameters() if p.requires_grad]
    loss = first()
    layer.bind(layer.inject(graphs[1].features, graphs[1]), graphs[1])(x)
    loss.backward()
    for parameter, gradient in zip((p for p in layer.parameters() if p.requires_grad), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("grad", [EXACT, UPG(k=5, lam=0.5), NPG(k=5, lam=0.8)], ids=["implicit", "upg", "npg"])
@pytest.mark.parametrize("kind", [ImplicitGraphLayer, SpectralGraphLayer])
def test_every_parameter_gets_a_gradient_but_the_dead(kind, grad):
    model = node_model(grad, layer=make_layer(kind))
    with torch.no_grad():  # the rows of a spectral weight are scaled, and their lengths learnt, only beyond norm one
        for parameter in model.layers.parameters():
            parameter.mul_(5 if parameter.shape[-1] > 1 else 1)
    logits, solutions = model(directed_graph())
    logits.square().sum().backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    unused = ("omega_2", "bias") if kind is ImplicitGraphLayer else ("bias",)
    assert dead == {f"layers.{i}.{name}" for i in range(3) for name in unused}
    assert len(solutions) == 3 and all(bool((s.stats.converged | s.stats.stalled).all()) for s in solutions)


def test_the_jacobian_penalty_differentiates():
    graph = directed_graph()
    layer = make_layer()(in_features=4, features=5).double()
    f = layer.bind(layer.inject(graph.features, graph), graph)
    JacobianRegularizer(num_probes=2)(f, randn(1, 9, 5).abs()).backward()
    assert layer.W.grad.abs().sum() > 0


def test_a_batch_of_graphs_is_each_graph():
    one, two = directed_graph(6, seed=1), directed_graph(9, seed=4)
    radius = max(one.radius, two.radius)

    def place(graph: Graph, shift: int) -> tuple[Tensor, Tensor]:
        dense = graph.adjacency.to_dense()
        edges = dense.nonzero().T
        return edges + shift, dense[tuple(edges)]

    (first, a), (second, b) = place(one, 0), place(two, 6)
    both = Graph(
        features=torch.cat([one.features, two.features]),
        adjacency=sparse_matrix(torch.cat([first, second], dim=1), torch.cat([a, b]), (15, 15)),
        radius=radius,
        pooling=membership([6, 9], ones(15)),
    )
    model = graph_model().eval()
    together, _ = model(both)
    for i, graph in enumerate((one, two)):
        pooling = membership([graph.num_nodes], ones(graph.num_nodes))
        alone, _ = model(Graph(graph.features, graph.adjacency, radius, pooling))
        assert (alone[0] - together[i]).abs().max() < 1e-10


def test_a_graph_without_edges_and_an_isolated_node():
    """Raw: the equilibrium is zero where nothing comes in. Normalised: every node keeps its self-loop."""
    none = torch.zeros(2, 0, dtype=torch.long)
    layer = make_layer()(in_features=4, features=5).double()
    adjacency = sparse_matrix(none, torch.zeros(0, dtype=torch.float64), (3, 3))
    graph = Graph(features=randn(3, 4), adjacency=adjacency, radius=spectral_radius(adjacency) + 1e-5)
    injection = layer.inject(graph.features, graph)
    solution = solve(deq(), layer, injection, injection, graph)
    solution.value.sum().backward()
    assert solution.value.abs().max() == 0 and bool(solution.stats.converged.all())
    assert layer.W.grad.abs().max() == 0

    edges = torch.tensor([[0, 1], [1, 0]])  # node 2 is isolated
    adjacency = normalized_adjacency(edges, 3, "symmetric", torch.float64)
    graph = Graph(features=randn(3, 4), adjacency=adjacency, radius=1.0, pooling=membership([2, 1], ones(3)))
    logits, _ = graph_model()(graph)
    alone = normalized_adjacency(none, 1, "symmetric", torch.float64)
    single = Graph(graph.features[2:], alone, 1.0, membership([1], ones(1)))
    assert logits.isfinite().all() and (graph_model()(single)[0][0] - logits[1]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", [ImplicitGraphLayer, SpectralGraphLayer])
@pytest.mark.parametrize("training", [True, False])
def test_a_graph_without_cycles_bounds_no_weight(kind, training):
    """Its radius is 0, and the exact equilibrium is there after as many steps as the longest path has edges."""
    adjacency = sparse_matrix(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, dtype=torch.float64), (3, 3))
    graph = Graph(features=randn(3, 4), adjacency=adjacency, radius=spectral_radius(adjacency))
    assert graph.radius == 0.0
    layer = make_layer(kind)(in_features=4, features=5).double().train(training)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    injection = layer.inject(graph.features, graph)
    solution = solve(deq(), layer, injection, torch.zeros_like(injection), graph)
    assert bool(solution.stats.converged.all()) and solution.stats.num_steps.item() <= 4
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_official_names_load():
    def official(name: str) -> str:
        head, part = name.split(".", 1)
        if head == "layers":
            number, part = part.split(".", 1)
            part = part.replace("omega", "Omega")
            for ours, theirs in ((".weight", "_orig"), (".g", "_g"), (".u", "_u"), (".v", "_v")):
                part = part.replace(ours, theirs)
            return f"ig{int(number) + 1}.{part}"
        if head == "skips":
            number, part = part.split(".")
            return f"V{'' if number == '2' else '_' + number}.{part}"
        return {"hidden": "V_0", "classifier": "V_1"}[head] + "." + part

    for make, layer, source in (
        (graph_model, ImplicitGraphLayer, "ignn"),
        (node_model, ImplicitGraphLayer, "ignn"),
        (node_model, SpectralGraphLayer, "torchdeq"),
    ):
        model, other = make(layer=make_layer(layer)), make(layer=make_layer(layer))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(torch.rand_like(tensor))
        load_reference(other, {official(name): value for name, value in model.state_dict().items()}, source)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )
        with pytest.raises(ValueError, match="missing"):
            load_reference(other, {"ig1.W": torch.zeros(6, 6)}, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": make_layer(kappa=1.0)}, "kappa=1.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"hidden": 0}, "hidden=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"layer": make_layer(dead="no")}, "dead_parameters='no' must be true or false"),
        ({"layer": make_layer(SpectralGraphLayer, dead=1)}, "dead_parameters=1 must be true or false"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        graph_model(**change)


def test_graph_classification_needs_to_know_the_graphs():
    graph = directed_graph()
    with pytest.raises(ValueError, match="pooling is None"):
        graph_model()(Graph(graph.features, graph.adjacency, graph.radius))


def test_layers_of_graph_classification_start_at_their_injection():
    graph = directed_graph()
    graph = replace(graph, pooling=membership([graph.num_nodes], ones(graph.num_nodes)))
    model = graph_model()
    _, solutions = model(graph)
    torch.testing.assert_close(solutions[0].z0[0], model.layers[0].inject(graph.features, graph).detach())
