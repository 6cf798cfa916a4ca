"""Random batches of every kind of task that the benchmark times."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from data.graphs.graph import Graph, normalized_adjacency, union

# kinds of task that have a random batch, and a data leaf of each
DATA = {"image_classification": "cifar10", "language_modelling": "wikitext103", "graph_classification": "cox2"}
NODE_LABELS = 35  # as many as COX2 has


def make(kind: str, *, batch: int, size: int, classes: int) -> tuple[dict[str, int], tuple[Any, ...]]:
    """Return (the model's numbers of the data, a random batch), the same at every call.

    Args:
        batch: images, streams or graphs.
        size: pixels of a side, tokens of a segment, or nodes of a graph.
        classes: of images or graphs; words of the vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "image_classification":
        images = torch.randn(batch, 3, size, size, generator=generator)
        labels = torch.randint(classes, (batch,), generator=generator)
        return {"in_channels": 3, "num_classes": classes}, (images, labels)
    if kind == "language_modelling":
        words = torch.randint(classes, (batch, size + 1), generator=generator)
        return {"vocab_size": classes}, (words[:, :-1].contiguous(), words[:, 1:].contiguous())
    graphs = union([_graph(size, generator) for _ in range(batch)])
    labels = torch.randint(classes, (batch,), generator=generator)
    return {"in_features": NODE_LABELS, "num_classes": classes}, (graphs, labels)


def _graph(nodes: int, generator: torch.Generator) -> Graph:
    """Return a ring with as many random chords as nodes, both ways: about as dense as PROTEINS."""
    ring = torch.stack([torch.arange(nodes), torch.arange(nodes).roll(-1)])
    edges = torch.cat([ring, torch.randint(nodes, (2, nodes), generator=generator)], dim=1)
    edges = torch.unique(torch.cat([edges, edges.flip(0)], dim=1), dim=1)
    adjacency = normalized_adjacency(edges, nodes, "symmetric")
    labels = torch.randint(NODE_LABELS, (nodes,), generator=generator)
    features = torch.nn.functional.one_hot(labels, NODE_LABELS).float()
    return Graph(features=features, adjacency=adjacency, radius=1.0)


@torch.no_grad()
def full_memory(model: nn.Module, batch: tuple[Any, ...]) -> Any:
    """Return the memory of streams that have been read for long: every step is to see all of `mem_len`."""
    memory = None
    for _ in range(math.ceil(model.mem_len / batch[0].shape[1])):
        *_, memory = model(*batch, memory)
    return memory
