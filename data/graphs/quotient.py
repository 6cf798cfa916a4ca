"""Exact compression of a graph: nodes that message passing cannot tell apart become one.

Nodes of one class have equal features, and receive equal weights from every class: every layer gives them equal states,
at every step and at the equilibrium. One of them stands for all, and counts as many times where a graph's nodes are
summed. Value and gradient stay as they are, but for rounding. The cotangents of a class add up to that of its node, so
an absolute stop of the adjoint solve is stricter by that factor at most.

Source: Bollen et al., *Learning Graph Neural Networks using Exact Compression* (2023).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from itertools import pairwise

import torch

from data.graphs.graph import Graph, sparse_matrix


def quotient(graph: Graph) -> Graph:
    """Return `graph` with one node per class of `node_classes`; its adjacency is directed, in general.

    Entry (c, d) is the total weight from the nodes of class c to any one node of class d.
    """
    classes = torch.tensor(node_classes(graph))
    sizes = torch.bincount(classes)
    count = sizes.numel()
    if count == graph.num_nodes:
        return graph
    nodes = torch.arange(graph.num_nodes)
    first = torch.full((count,), graph.num_nodes).scatter_reduce(0, classes, nodes, "amin")
    offsets, sources, weights = graph.adjacency.columns
    targets = torch.repeat_interleave(nodes, offsets.diff().long())
    kept = first[classes[targets]] == targets
    edges = classes[torch.stack([sources[kept].long(), targets[kept]])]
    return replace(
        graph,
        features=graph.features[first],
        adjacency=sparse_matrix(edges, weights[kept], (count, count)),
        multiplicity=sizes.to(graph.features.dtype),
    )


def node_classes(graph: Graph) -> list[int]:
    """Return the class of every node, by colour refinement: equal features, and equal weights from equal colours.

    Weights are compared as stored: where rounding has split what is equal, nodes stay apart, which is right and slower.
    """
    offsets, sources, weights = graph.adjacency.columns
    sources, starts = sources.long(), offsets.tolist()
    targets = torch.repeat_interleave(torch.arange(graph.num_nodes), offsets.diff().long())
    values, value = torch.unique(weights, return_inverse=True)
    kinds = graph.num_nodes * len(values)  # an arc's kind is the colour of its source and its weight
    colors, count = _number(map(tuple, graph.features.tolist())), -1
    while count < max(colors, default=-1):
        count = max(colors)
        # arcs are ordered by target already; sort those of each target by kind
        ordered = (targets * kinds + torch.tensor(colors)[sources] * len(values) + value).sort().values
        received = (ordered - targets * kinds).numpy()
        colors = _number((colors[i], received[a:b].tobytes()) for i, (a, b) in enumerate(pairwise(starts)))
    return colors


def _number(keys: Iterable[Hashable]) -> list[int]:
    """Return a number for every key, the same for equal ones."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]
