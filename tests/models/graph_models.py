"""A small directed graph and small IGNNs in float64, solved tightly."""

import functools

import torch
from torch import Tensor

from data.graphs.graph import Graph, membership, sparse_matrix, spectral_radius
from models.ignn.layers import ImplicitGraphLayer
from models.ignn.model import GraphIGNN, NodeIGNN
from phantom import DEQ, FixedPoint, GradientEstimator, Implicit

TIGHT = FixedPoint(max_steps=3000, tol=1e-14, stop="absolute", norm="max")
EXACT = Implicit(solver=TIGHT)


def make_layer(kind: type = ImplicitGraphLayer, kappa: float = 0.9, dead: bool = True):
    return functools.partial(kind, kappa=kappa, dead_parameters=dead)


def deq(grad: GradientEstimator = EXACT) -> DEQ:
    return DEQ(solver=TIGHT, grad=grad)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)


def directed_graph(nodes: int = 9, features: int = 4, seed: int = 0) -> Graph:
    weights = randn(nodes, nodes, seed=seed).clamp_min(0) * (randn(nodes, nodes, seed=seed + 1) > 0.3)
    edges = weights.nonzero().T
    adjacency = sparse_matrix(edges, weights[tuple(edges)], (nodes, nodes))
    assert adjacency.rows is not adjacency.columns
    return Graph(
        features=randn(nodes, features, seed=seed + 2),
        adjacency=adjacency,
        radius=spectral_radius(adjacency),
        pooling=membership([4, nodes - 4], ones(nodes)),
    )


def graph_model(grad: GradientEstimator = EXACT, **changes) -> GraphIGNN:
    settings = {"hidden": 6, "num_layers": 2, "dropout": 0.0, "layer": make_layer(), "in_features": 4, "num_classes": 3}
    torch.manual_seed(0)
    return GraphIGNN(**{**settings, **changes}, deq=deq(grad)).double()


def node_model(grad: GradientEstimator = EXACT, **changes) -> NodeIGNN:
    settings = {"widths": [6, 5], "layer": make_layer(), "in_features": 4, "num_labels": 3}
    torch.manual_seed(0)
    return NodeIGNN(**{**settings, **changes}, deq=deq(grad)).double()
