"""Colour refinement: merge the nodes of a graph that message passing cannot distinguish.

Nodes of one colour have equal features and receive equal weights from every colour, so every layer gives them equal
states, at every step and at the equilibrium. One node represents its colour, and pooling counts it once per original
node. Values and gradients change only by rounding. The cotangent of a merged node is the sum over its colour, so an
absolute stop of the adjoint solve becomes stricter, at most by the number of nodes of that colour.

Source: Bollen et al., *Learning Graph Neural Networks using Exact Compression* (2023).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from itertools import pairwise

import torch

from data.graphs.graph import Graph, sparse_matrix


def merge_nodes(graph: Graph) -> Graph:
    """Return `graph` with one node per colour of `refine_colors`; in general, its adjacency is directed.

    Entry (c, d) is the total weight from the nodes of colour c to any one node of colour d.
    """
    colors = torch.tensor(refine_colors(graph), dtype=torch.int64)  # which a graph without nodes has to be told
    sizes = torch.bincount(colors)
    count = sizes.numel()
    if count == graph.num_nodes:
        return graph
    nodes = torch.arange(graph.num_nodes)
    first = torch.full((count,), graph.num_nodes).scatter_reduce(0, colors, nodes, "amin")
    offsets, sources, weights = graph.adjacency.columns
    targets = torch.repeat_interleave(nodes, offsets.diff().long())
    kept = first[colors[targets]] == targets
    edges = colors[torch.stack([sources[kept].long(), targets[kept]])]
    return replace(
        graph,
        features=graph.features[first],
        adjacency=sparse_matrix(edges, weights[kept], (count, count)),
        multiplicity=sizes.to(graph.features.dtype),
    )


def refine_colors(graph: Graph) -> list[int]:
    """Return the colour of every node: equal if features, and weights received from every colour, are equal.

    Weights are compared as stored. If rounding has split equal weights, their nodes keep different colours, which is
    correct but slower.
    """
    offsets, sources, weights = graph.adjacency.columns
    sources, starts = sources.long(), offsets.tolist()
    targets = torch.repeat_interleave(torch.arange(graph.num_nodes), offsets.diff().long())
    values, value = torch.unique(weights, return_inverse=True)
    num_kinds = graph.num_nodes * len(values)  # the kind of an edge is the pair (colour of its source, its weight)
    colors, count = _number(map(tuple, graph.features.tolist())), -1
    while count < max(colors, default=-1):
        count = max(colors)
        # edges are already ordered by target; sort the edges of each target by kind
        ordered = (targets * num_kinds + torch.tensor(colors)[sources] * len(values) + value).sort().values
        received = (ordered - targets * num_kinds).numpy()
        colors = _number((colors[i], received[a:b].tobytes()) for i, (a, b) in enumerate(pairwise(starts)))
    return colors


def _number(keys: Iterable[Hashable]) -> list[int]:
    """Number the keys in order of first occurrence; equal keys share a number."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]
