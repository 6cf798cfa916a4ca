"""IGNN for three kinds of graph tasks: graph classification, node labelling, node classification on chains.

N nodes, G graphs, p input features, m hidden features. Every model takes a graph (see `GraphInput`) and returns its
logits with one Solution per implicit layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ignn.layers import GraphInput, GraphLayer
from models.ignn.sparse import multiply
from phantom import DEQ, Solution
from phantom.layers import check_dropout
from phantom.validate import check_count

LayerFactory = Callable[..., nn.Module]  # called with in_features and features


class GraphIGNN(nn.Module):
    """Classify graphs: stacked implicit layers, a sum over each graph's nodes, a perceptron of two layers.

    Args:
        hidden: m.
        num_layers: implicit layers (three in Table 4, Geng et al. 2021).
        dropout: probability before the last linear map.
        layer: makes an implicit layer from `in_features` and `features`.
        in_features: p.
        num_classes: width of the logits.
        deq: solves every layer, starting at its injection.
    """

    kinds = ("graph_classification",)
    layers: Any  # a ModuleList of GraphLayers

    def __init__(
        self,
        *,
        hidden: int,
        num_layers: int,
        dropout: float,
        layer: LayerFactory,
        in_features: int,
        num_classes: int,
        deq: DEQ,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        check_count("hidden", hidden, least=1)
        check_count("num_layers", num_layers, least=1)
        self.layers = make_layers(layer, [in_features] + [hidden] * num_layers)
        self.hidden = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.deq = deq

    def forward(self, graph: GraphInput) -> tuple[Tensor, tuple[Solution, ...]]:
        """Return logits (G, classes) and one Solution per layer."""
        if graph.pooling is None:
            raise ValueError("graph.pooling is None: graph classification needs the (G, N) sum over each graph's nodes")
        x, solutions = graph.features, []
        for layer in self.layers:
            injection = layer.inject(x, graph)
            solutions.append(solve(self.deq, layer, injection, injection, graph))
            x = solutions[-1].value.squeeze(0)
        pooled = multiply(graph.pooling, x)
        return self.classifier(self.dropout(F.relu(self.hidden(pooled)))), tuple(solutions)


class NodeIGNN(nn.Module):
    """Label nodes: blocks x <- ELU(X* + Linear(x)), X* the block's equilibrium; the last block has no ELU.

    Args:
        widths: features of every block but the last, whose width is `num_labels`.
        layer: makes an implicit layer from `in_features` and `features`.
        in_features: p.
        num_labels: number of independent labels per node.
        deq: solves every layer, starting at its injection.
    """

    kinds = ("node_labelling",)
    layers: Any  # a ModuleList of GraphLayers

    def __init__(
        self, *, widths: Sequence[int], layer: LayerFactory, in_features: int, num_labels: int, deq: DEQ
    ) -> None:
        super().__init__()
        for i, width in enumerate(widths):
            check_count(f"widths[{i}]", width, least=1)
        sizes = [in_features, *widths, num_labels]
        self.layers = make_layers(layer, sizes)
        self.skips = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.deq = deq

    def forward(self, graph: GraphInput) -> tuple[Tensor, tuple[Solution, ...]]:
        """Return logits (N, labels) and one Solution per block."""
        x, solutions = graph.features, []
        for i, (layer, skip) in enumerate(zip(self.layers, self.skips, strict=True)):
            injection = layer.inject(x, graph)
            solutions.append(solve(self.deq, layer, injection, injection, graph))
            x = solutions[-1].value.squeeze(0) + skip(x)
            if i + 1 < len(self.layers):
                x = F.elu(x)
        return x, tuple(solutions)


class ChainsIGNN(nn.Module):
    """Classify nodes: one implicit layer, every node's state normalised to length one, a linear map without bias.

    At initialisation the signal from d edges away has size about 10^-d, and normalising each state brings it to full
    size. Use a relative or very tight tolerance: an absolute one stops before distant nodes get the signal.

    Args:
        hidden: m.
        dropout: probability before the linear map.
        layer: makes an implicit layer from `in_features` and `features`.
        in_features: p.
        num_classes: width of the logits.
        deq: solves the layer, starting at zero.
    """

    kinds = ("node_classification",)
    layers: Any  # a ModuleList of GraphLayers

    def __init__(
        self, *, hidden: int, dropout: float, layer: LayerFactory, in_features: int, num_classes: int, deq: DEQ
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        check_count("hidden", hidden, least=1)
        self.layers = make_layers(layer, [in_features, hidden])
        self.classifier = nn.Linear(hidden, num_classes, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.deq = deq

    def forward(self, graph: GraphInput) -> tuple[Tensor, tuple[Solution, ...]]:
        """Return logits (N, classes) and the one Solution in a tuple."""
        injection = self.layers[0].inject(graph.features, graph)
        solution = solve(self.deq, self.layers[0], injection, torch.zeros_like(injection), graph)
        direction = F.normalize(solution.value.squeeze(0), dim=1)
        return self.classifier(self.dropout(direction)), (solution,)


def solve(deq: DEQ, layer: GraphLayer, injection: Tensor, start: Tensor, graph: GraphInput) -> Solution:
    """Solve for the equilibrium (1, N, m) of `layer`, starting at `start` (N, m)."""
    return deq(layer.bind(injection, graph), start.detach().unsqueeze(0), in_place=True)


def make_layers(layer: LayerFactory, sizes: Sequence[int]) -> nn.ModuleList:
    """Return one layer per pair of consecutive sizes."""
    return nn.ModuleList(layer(in_features=a, features=b) for a, b in pairwise(sizes))
