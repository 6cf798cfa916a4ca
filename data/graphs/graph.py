"""Sparse graphs as plain tensors: adjacency in compressed rows and columns, disjoint unions, spectral radius.

N nodes, p features, G graphs. `adjacency[i, j]` is the weight of the edge from node i to node j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from phantom.engine.errors import DataError
from phantom.validate import check_choice

Scaling = Literal["symmetric", "doubled"]

# The official IGNN code adds this to a computed spectral radius: |W|_inf stays below kappa / rho by a margin, and a
# graph without cycles (rho = 0) needs no special case.
RADIUS_MARGIN = 1e-5


class Rows(NamedTuple):
    """The non-zeros of a matrix row by row: row i has `columns[offsets[i]:offsets[i + 1]]`.

    Args:
        offsets: (rows + 1,) int32.
        columns: (nonzeros,) int32.
        weights: (nonzeros,) floating point.
    """

    offsets: Tensor
    columns: Tensor
    weights: Tensor


@dataclass(frozen=True)
class SparseMatrix:
    """A constant sparse matrix M, stored with its transpose: products with M and with M^T both read rows.

    Args:
        rows: the rows of M.
        columns: the rows of M^T; the same object if M is symmetric.
    """

    rows: Rows
    columns: Rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseMatrix:
        """Return the matrix on `device`."""
        rows = Rows(*(part.to(device, non_blocking=non_blocking) for part in self.rows))
        if self.columns is self.rows:
            return SparseMatrix(rows, rows)
        return SparseMatrix(rows, Rows(*(part.to(device, non_blocking=non_blocking) for part in self.columns)))

    def to_dense(self) -> Tensor:
        """Return the dense matrix; for tests and small graphs."""
        shape = (self.rows.offsets.numel() - 1, self.columns.offsets.numel() - 1)
        dense = self.rows.weights.new_zeros(shape)
        counts = self.rows.offsets.diff().long()
        sources = torch.repeat_interleave(torch.arange(shape[0], device=counts.device), counts)
        return dense.index_put((sources, self.rows.columns.long()), self.rows.weights, accumulate=True)


@dataclass(frozen=True)
class Graph:
    """One graph, or a batch of graphs as their disjoint union.

    Args:
        features: (N, p).
        adjacency: (N, N).
        radius: an upper bound of the spectral radius of |adjacency|.
        pooling: (G, N) sum over the nodes of each of G graphs; None outside graph classification.
        multiplicity: (N,) number of original nodes that a node represents (see refinement.py); None means one.
    """

    features: Tensor
    adjacency: SparseMatrix
    radius: float
    pooling: SparseMatrix | None = None
    multiplicity: Tensor | None = None

    @property
    def num_nodes(self) -> int:
        return self.features.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Graph:
        """Return the graph on `device`; the same object if it is already there."""
        if self.features.device == torch.device(device):
            return self
        return replace(
            self,
            features=self.features.to(device, non_blocking=non_blocking),
            adjacency=self.adjacency.to(device, non_blocking),
            pooling=None if self.pooling is None else self.pooling.to(device, non_blocking),
            multiplicity=None if self.multiplicity is None else self.multiplicity.to(device, non_blocking=non_blocking),
        )


def sparse_matrix(edges: Tensor, weights: Tensor, shape: tuple[int, int]) -> SparseMatrix:
    """Build the matrix with `weights` (E,) at the (row, column) pairs `edges` (2, E); duplicates are summed.

    Raises:
        DataError: an index is negative or beyond `shape`, a weight is not finite, or the sizes disagree.
    """
    if edges.dim() != 2 or edges.shape[0] != 2 or weights.shape != edges.shape[1:]:
        raise DataError(
            f"edges must be (2, E) with E weights, got {tuple(edges.shape)} and {tuple(weights.shape)}: "
            "one row of source nodes, one of target nodes"
        )
    check_edges(edges, shape)
    if not bool(torch.isfinite(weights).all()):
        bad = int((~torch.isfinite(weights)).sum())
        raise DataError(f"{bad} of {weights.numel()} edge weights are NaN or infinite: every weight must be finite")
    rows = _compress(edges[0], edges[1], weights, shape)
    columns = _compress(edges[1], edges[0], weights, (shape[1], shape[0]))
    symmetric = all(torch.equal(a, b) for a, b in zip(rows, columns, strict=True))
    return SparseMatrix(rows, rows if symmetric else columns)


def check_edges(edges: Tensor, shape: tuple[int, int]) -> None:
    """Raise DataError unless every index of `edges` (2, E) lies within `shape`."""
    if edges.numel() == 0:
        return
    low, high = edges.amin(dim=1).tolist(), edges.amax(dim=1).tolist()
    if min(low) < 0 or high[0] >= shape[0] or high[1] >= shape[1]:
        raise DataError(
            f"edge indices are in {low[0]}..{high[0]} and {low[1]}..{high[1]}, but must be in 0..{shape[0] - 1} and "
            f"0..{shape[1] - 1}: node ids are zero-based and less than the number of nodes"
        )


def _compress(row: Tensor, column: Tensor, weights: Tensor, shape: tuple[int, int]) -> Rows:
    keys, inverse = torch.unique(row.long() * shape[1] + column.long(), return_inverse=True)
    summed = torch.zeros(keys.numel(), dtype=weights.dtype).index_add_(0, inverse, weights)
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int32)
    if keys.numel():
        counts = torch.bincount(torch.div(keys, shape[1], rounding_mode="floor"), minlength=shape[0])
        offsets[1:] = counts.cumsum(0)
    return Rows(offsets, (keys % max(shape[1], 1)).int(), summed)


def normalized_adjacency(
    edges: Tensor, num_nodes: int, scaling: Scaling, dtype: torch.dtype = torch.float32
) -> SparseMatrix:
    """Return D^-1/2 (A + I) D^-1/2 with D the row sums of A + I; `doubled` replaces A by A + A^T.

    Self-loops make every row sum positive; an isolated node has weight 1 on itself. The spectral radius is exactly 1:
    the matrix is similar to a row-stochastic one. The official IGNN evaluation uses `doubled`: on an undirected graph
    it evaluates with 2A + I after training with A + I.
    """
    check_choice("scaling", scaling, ("symmetric", "doubled"))
    check_edges(edges, (num_nodes, num_nodes))
    loops = torch.arange(num_nodes).expand(2, num_nodes)
    pairs = torch.cat([edges, edges.flip(0), loops] if scaling == "doubled" else [edges, loops], dim=1)
    degree = torch.bincount(pairs[0], minlength=num_nodes).to(dtype)
    return sparse_matrix(pairs, (degree[pairs[0]] * degree[pairs[1]]).rsqrt(), (num_nodes, num_nodes))


def membership(sizes: Sequence[int], multiplicity: Tensor) -> SparseMatrix:
    """Return the (G, N) matrix that sums the nodes of each of G consecutive graphs, weighted by `multiplicity` (N,)."""
    graph = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))
    nodes = torch.arange(graph.numel())
    return sparse_matrix(torch.stack([graph, nodes]), multiplicity, (len(sizes), graph.numel()))


def union(graphs: Sequence[Graph]) -> Graph:
    """Return the disjoint union: block-diagonal adjacency, stacked features, the largest radius."""
    rows = _stack([graph.adjacency.rows for graph in graphs])
    shared = all(graph.adjacency.columns is graph.adjacency.rows for graph in graphs)
    columns = rows if shared else _stack([graph.adjacency.columns for graph in graphs])
    multiplicity = torch.cat(
        [
            graph.features.new_ones(graph.num_nodes) if graph.multiplicity is None else graph.multiplicity
            for graph in graphs
        ]
    )
    return Graph(
        features=torch.cat([graph.features for graph in graphs]),
        adjacency=SparseMatrix(rows, columns),
        radius=max(graph.radius for graph in graphs),
        pooling=membership([graph.num_nodes for graph in graphs], multiplicity),
        multiplicity=multiplicity,
    )


def _stack(blocks: Sequence[Rows]) -> Rows:
    nodes = nonzeros = 0
    offsets, columns = [blocks[0].offsets[:1]], []
    for block in blocks:
        offsets.append(block.offsets[1:] + nonzeros)
        columns.append(block.columns + nodes)
        nodes += block.offsets.numel() - 1
        nonzeros += block.columns.numel()
    return Rows(torch.cat(offsets), torch.cat(columns), torch.cat([block.weights for block in blocks]))


def spectral_radius(matrix: SparseMatrix) -> float:
    """Return the spectral radius of |M|: the largest Perron root over the strongly connected components.

    Each component's matrix is irreducible, so this is exact even where M is defective (a chain) or nilpotent.
    """
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    offsets, columns, weights = (part.numpy() for part in matrix.rows)
    size = len(offsets) - 1
    if len(columns) == 0:
        return 0.0
    a = csr_matrix((np.abs(weights).astype(np.float64), columns, offsets), shape=(size, size))
    count, label = connected_components(a, directed=True, connection="strong")
    sizes = np.bincount(label, minlength=count)
    radius = float(a.diagonal().max())  # the Perron root of a single node is its self-loop
    order, starts = np.argsort(label, kind="stable"), np.concatenate([[0], np.cumsum(sizes)])
    for component in np.flatnonzero(sizes > 1):
        nodes = order[starts[component] : starts[component + 1]]
        radius = max(radius, _perron_root(a[nodes][:, nodes], symmetric=matrix.columns is matrix.rows))
    return radius


def _perron_root(a: Any, *, symmetric: bool) -> float:
    """Return the spectral radius of an irreducible non-negative scipy matrix: a simple, real eigenvalue."""
    import numpy as np
    from scipy.sparse.linalg import ArpackNoConvergence, eigs, eigsh

    if a.shape[0] <= 64:
        return float(np.abs(np.linalg.eigvals(a.toarray())).max())
    # ask for the largest value, not the largest modulus: on a bipartite component -rho is an eigenvalue too
    solve, which = (eigsh, "LA") if symmetric else (eigs, "LR")
    try:
        return float(np.abs(solve(a, k=1, which=which, v0=np.ones(a.shape[0]), return_eigenvectors=False)).max())
    except ArpackNoConvergence:
        return float(min(a.sum(axis=0).max(), a.sum(axis=1).max()))  # an upper bound of the root
