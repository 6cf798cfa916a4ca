"""Colour refinement: the colours by hand, and the same equilibria, logits and gradients as of the whole graph."""

from functools import partial

import pytest
import torch

from data.graphs.graph import Graph, normalized_adjacency, sparse_matrix, union
from data.graphs.refinement import merge_nodes, refine_colors
from models.ignn.layers import ImplicitGraphLayer
from models.ignn.model import GraphIGNN
from phantom import DEQ, NPG, UPG, FixedPoint, Implicit

EXACT = FixedPoint(max_steps=500, tol=1e-14, stop="absolute", norm="max")


def graph_of(edges: list[tuple[int, int]], labels: list[int], scaling: str = "symmetric") -> Graph:
    """An undirected graph with one-hot labels, in float64."""
    pairs = torch.tensor(edges + [(b, a) for a, b in edges], dtype=torch.long).reshape(-1, 2).T
    features = torch.eye(3, dtype=torch.float64)[labels]
    return Graph(features, normalized_adjacency(pairs, len(labels), scaling, torch.float64), radius=1.0)


def ring(size: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % size) for i in range(size)]


# a ring with one marked node, a star, a path, a triangle beside a hexagon (message passing cannot distinguish them),
# a graph without edges, and one where nothing is equal
GRAPHS = {
    "ring": (graph_of(ring(6), [1, 0, 0, 0, 0, 0]), [0, 1, 2, 3, 2, 1]),
    "star": (graph_of([(0, 1), (0, 2), (0, 3)], [0, 0, 0, 0]), [0, 1, 1, 1]),
    "path": (graph_of([(0, 1), (1, 2), (2, 3)], [0, 0, 0, 0]), [0, 1, 1, 0]),
    "triangle and hexagon": (graph_of(ring(3) + [(3 + a, 3 + b) for a, b in ring(6)], [0] * 9), [0] * 9),
    "no edges": (graph_of([], [0, 1, 0]), [0, 1, 0]),
    "all different": (graph_of([(0, 1), (1, 2)], [0, 1, 2]), [0, 1, 2]),
}


@pytest.mark.parametrize("graph, colors", GRAPHS.values(), ids=GRAPHS)
def test_colors_by_hand(graph, colors):
    assert refine_colors(graph) == colors


def test_weights_distinguish_nodes():
    """Nodes 1 and 2 receive from node 0 alone, by unequal weights; 3 and 4 by equal ones."""
    arcs = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4]])
    adjacency = sparse_matrix(arcs, torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64), (5, 5))
    graph = Graph(torch.ones(5, 1, dtype=torch.float64), adjacency, radius=1.0)
    assert refine_colors(graph) == [0, 1, 2, 3, 3]


def test_the_merged_graph_by_hand():
    star = GRAPHS["star"][0]
    merged = merge_nodes(star)
    whole, dense = star.adjacency.to_dense(), merged.adjacency.to_dense()
    assert merged.multiplicity.tolist() == [1, 3] and merged.features.shape == (2, 3)
    assert torch.allclose(dense, torch.stack([whole[0, :2], torch.stack([3 * whole[1, 0], whole[1, 1]])]))
    for same in (GRAPHS["all different"][0], graph_of([], [])):
        assert merge_nodes(same) is same


def random_graph(seed: int, scaling: str) -> Graph:
    """A random tree with few labels: many of its leaves are alike."""
    draws = torch.Generator().manual_seed(seed)
    size = 14
    parents = [int(torch.randint(max(1, i // 3), (1,), generator=draws)) for i in range(1, size)]
    labels = torch.randint(2, (size,), generator=draws).tolist()
    return graph_of([(parent, i + 1) for i, parent in enumerate(parents)], labels, scaling)


@pytest.mark.parametrize("scaling", ["symmetric", "doubled"])
@pytest.mark.parametrize(
    "grad", [Implicit(solver=EXACT), UPG(k=3, lam=0.5), NPG(k=3, lam=0.5)], ids=["implicit", "upg", "npg"]
)
def test_logits_and_gradients_are_those_of_the_whole(grad, scaling):
    graphs = [graph for graph, _ in GRAPHS.values()] + [random_graph(seed, scaling) for seed in range(6)]
    torch.manual_seed(0)
    layer = partial(ImplicitGraphLayer, kappa=0.9, dead_parameters=False)
    model = GraphIGNN(
        hidden=8,
        num_layers=2,
        dropout=0.0,
        layer=layer,
        in_features=3,
        num_classes=2,
        deq=DEQ(solver=EXACT, grad=grad),
    ).double()
    cotangent = torch.randn(len(graphs), 2, dtype=torch.float64)
    results = []
    for batch in (union(graphs), union([merge_nodes(graph) for graph in graphs])):
        logits, solutions = model(batch)
        assert all(bool(solution.stats.converged.all()) for solution in solutions)
        results.append((batch.num_nodes, [logits, *torch.autograd.grad(logits, list(model.parameters()), cotangent)]))
    (nodes, whole), (fewer, merged) = results
    assert fewer < 0.7 * nodes
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
