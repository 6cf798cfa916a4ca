"""The files of a TU data set: which there must be, and what they hold.

<root>/raw/<name>_A.txt and so on. Source: Morris et al., *TUDataset* (2020); read by torch_geometric.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.graphs.geometric import without_deprecations
from data.graphs.graph import Graph, Scaling, normalized_adjacency
from data.paths import root_hint
from phantom.engine.errors import DataError


class Metadata(NamedTuple):
    """Sizes of a data set, known before its files are read: node label columns, classes, graphs."""

    in_features: int
    num_classes: int
    num_graphs: int


METADATA = {"COX2": Metadata(35, 2, 467), "PROTEINS": Metadata(3, 2, 1113)}


class Raw:
    """A TU data set in memory: the nodes and edges of all graphs, concatenated.

    Args:
        features: (N, p).
        edges: (2, E), node ids within their graph.
        nodes, arcs: (G + 1,) offset of the first node and the first edge of each graph.
        labels: (G,).
    """

    def __init__(self, *, features: Tensor, edges: Tensor, nodes: Tensor, arcs: Tensor, labels: Tensor) -> None:
        self.features, self.edges, self.nodes, self.arcs, self.labels = features, edges, nodes, arcs, labels
        self.metadata = Metadata(features.shape[1], int(labels.max()) + 1, labels.numel())

    def graph(self, index: int, scaling: Scaling) -> Graph:
        """Return one graph with its normalised adjacency."""
        features = self.features[self.nodes[index] : self.nodes[index + 1]]
        edges = self.edges[:, self.arcs[index] : self.arcs[index + 1]]
        return Graph(features=features, adjacency=normalized_adjacency(edges, features.shape[0], scaling), radius=1.0)


def read_tu(root: Path, name: str, *, download: bool) -> Raw:
    """Read the raw files of a TU data set, with torch_geometric's reader.

    Raises:
        DataError: files are missing (and `download` is off or fails), or cannot be read.
    """
    folder = root / "raw"
    parts = ("A", "graph_indicator", "graph_labels", *(("node_labels",) if name in METADATA else ()))
    needed = [folder / f"{name}_{part}.txt" for part in parts]
    if download and not all(path.is_file() for path in needed):
        _fetch(root, name)
    missing = [path.name for path in needed if not path.is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {', '.join(missing)}. {root_hint(name)}, or download the files with data.download=true"
        )
    with without_deprecations():
        from torch_geometric.io import read_tu_data

    parts = (*parts, "node_labels", "node_attributes", "edge_labels", "edge_attributes", "graph_attributes")
    _check_text([folder / f"{name}_{part}.txt" for part in parts])
    num_nodes = _count_nodes(needed[1])
    try:
        read: Any = read_tu_data(os.fspath(folder), name)
        data, slices, sizes = read
    except (IndexError, RuntimeError, ValueError) as error:
        raise DataError(f"{folder} holds files that cannot be read as a TU data set: {error}") from error
    features, nodes = _features(data, slices, sizes["num_node_attributes"])
    if not bool(features.isfinite().all()):
        raise DataError(
            f"{folder / f'{name}_node_attributes.txt'} holds NaN or infinite entries: every one must be finite"
        )
    if features.shape[0] != num_nodes:
        raise DataError(
            f"{folder} describes {num_nodes} nodes by graph and {features.shape[0]} by labels or attributes: "
            "every node needs all"
        )
    arcs = slices["edge_index"]
    # the reader's offsets end at the last graph that has edges: extend them to the last graph
    arcs = torch.cat([arcs, arcs[-1:].expand(max(0, nodes.numel() - arcs.numel()))])
    counts = [nodes.numel() - 1, data.y.numel()]
    if len(set(counts)) > 1:
        raise DataError(
            f"{folder} describes {counts[0]} graphs by nodes and {counts[1]} by labels: every graph needs both"
        )
    graph_sizes = nodes.diff().repeat_interleave(arcs.diff())
    outside = ((data.edge_index < 0) | (data.edge_index >= graph_sizes)).any(dim=0)
    if bool(outside.any()):
        raise DataError(
            f"{needed[0]} has {int(outside.sum())} edges that leave their graph: node ids count from 1 "
            "over all graphs, and both ends of an edge must lie in the same graph"
        )
    return Raw(
        features=features,
        edges=data.edge_index,
        nodes=nodes,
        arcs=arcs,
        labels=data.y,
    )


def _check_text(files: Sequence[Path]) -> None:
    """Raise DataError where torch_geometric's reader would silently drop a line; the first file has the edges."""
    for path in files:
        if not path.is_file():
            continue
        text = path.read_bytes()
        if not text.strip():
            raise DataError(f"{path} is empty: copy or download it again, or remove it if the set needs no such file")
        if not text.endswith(b"\n"):  # it drops such a last line
            raise DataError(f"{path} does not end in a newline, so that its last line would be lost: add one")
    if re.search(r"(?m)(^|,)[ \t]*(0+|-\d+)[ \t]*(,|$)", files[0].read_text("utf-8")):  # and such an edge
        raise DataError(f"{files[0]} holds a node id below 1: node ids count from 1 over all graphs")


def _count_nodes(path: Path) -> int:
    """Return the number of nodes of a graph indicator, which names the graph of every node.

    Raises:
        DataError: it does not list them graph by graph: torch_geometric's reader takes that for granted, and would give
            features to the nodes of other graphs.
    """
    graphs = path.read_text("utf-8").split()
    due = [str(number) for number, (_, run) in enumerate(groupby(graphs), start=1) for _ in run]
    for node, (graph, expected) in enumerate(zip(graphs, due, strict=True), start=1):
        if graph != expected:
            raise DataError(
                f"{path} puts node {node} into graph {graph}, where graph {expected} is due: list the nodes graph by "
                "graph, from 1, at least one for every graph"
            )
    return len(graphs)


def _features(data: Any, slices: Any, num_attributes: int) -> tuple[Tensor, Tensor]:
    """Return the features (N, p) of all nodes, and the offset of the first node of each graph (G + 1,)."""
    if data.x is None:  # the reader then counts the nodes of every graph
        counts = torch.tensor(data._num_nodes)
        return torch.ones(int(counts.sum()), 1), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    labels = data.x[:, num_attributes:]
    return (labels if labels.shape[1] else data.x).float().contiguous(), slices["x"]


def _fetch(root: Path, name: str) -> None:
    with without_deprecations():
        from torch_geometric.datasets import TUDataset

    try:
        # it also converts the files, and unpickles what it finds converted: not a copy that lies in `root`
        with tempfile.TemporaryDirectory() as converted:

            class Downloaded(TUDataset):
                raw_dir = property(lambda _: os.fspath(root / "raw"))
                processed_dir = property(lambda _: converted)

            Downloaded(os.fspath(root), name)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        raise DataError(f"{name} could not be downloaded to {root}: {error}") from error
