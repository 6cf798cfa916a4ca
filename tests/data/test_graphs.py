"""Sparse graphs: what goes in comes out dense, unions are block-diagonal, radii are exact, bad input is named."""

import pytest
import torch

from data.graphs.graph import Graph, SparseMatrix, normalized_adjacency, sparse_matrix, spectral_radius, union
from phantom.engine.errors import DataError
from phantom.engine.source import Shard


def matrix_of(dense: torch.Tensor):
    edges = dense.nonzero().T
    return sparse_matrix(edges, dense[tuple(edges)], tuple(dense.shape))


def test_dense_and_back():
    dense = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * (torch.arange(15).reshape(5, 3) % 2)
    assert torch.equal(matrix_of(dense).to_dense(), dense)
    transposed = SparseMatrix(matrix_of(dense).columns, matrix_of(dense).rows)
    assert torch.equal(transposed.to_dense(), dense.T)


def test_duplicates_add_and_symmetry_shares():
    edges = torch.tensor([[0, 1, 0], [1, 0, 1]])
    matrix = sparse_matrix(edges, torch.tensor([1.0, 3.0, 2.0]), (2, 2))
    assert torch.equal(matrix.to_dense(), torch.tensor([[0.0, 3.0], [3.0, 0.0]]))
    assert matrix.rows is matrix.columns
    moved = matrix.to("cpu")
    assert moved.rows is moved.columns


@pytest.mark.parametrize("symmetric", [True, False])
def test_union_is_block_diagonal(symmetric):
    generator = torch.Generator().manual_seed(1)
    graphs = []
    for nodes in (3, 1, 4):
        dense = torch.rand(nodes, nodes, generator=generator)
        dense = dense + dense.T if symmetric else dense
        graphs.append(Graph(torch.rand(nodes, 2, generator=generator), matrix_of(dense), radius=float(nodes)))
    both = union(graphs)
    blocks = torch.block_diag(*(graph.adjacency.to_dense() for graph in graphs))
    assert torch.equal(both.adjacency.to_dense(), blocks)
    transposed = SparseMatrix(both.adjacency.columns, both.adjacency.rows)
    assert torch.equal(transposed.to_dense(), blocks.T)
    assert (both.adjacency.rows is both.adjacency.columns) == symmetric
    assert both.radius == 4.0
    sums = torch.stack([graph.features.sum(dim=0) for graph in graphs])
    assert torch.allclose(both.pooling.to_dense() @ both.features, sums)


def test_normalised_adjacency_by_hand():
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    plain = normalized_adjacency(path, 4, "symmetric", torch.float64).to_dense()
    doubled = normalized_adjacency(path, 4, "doubled", torch.float64).to_dense()
    a = torch.zeros(4, 4, dtype=torch.float64)
    a[path[0], path[1]] = 1
    for ours, top in ((plain, a + torch.eye(4)), (doubled, 2 * a + torch.eye(4))):
        scale = top.sum(dim=1).rsqrt()
        assert torch.allclose(ours, scale[:, None] * top * scale)
        assert float(torch.linalg.eigvalsh(ours).max()) == pytest.approx(1.0)
    assert plain[3, 3] == 1, "an isolated node keeps its self-loop"


def test_normalised_adjacency_without_edges_is_the_identity():
    none = torch.zeros(2, 0, dtype=torch.long)
    for scaling in ("symmetric", "doubled"):
        assert torch.equal(normalized_adjacency(none, 3, scaling).to_dense(), torch.eye(3))


def blocks(nodes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(nodes, nodes, generator=generator, dtype=torch.float64) * (
        torch.rand(nodes, nodes, generator=generator) < 8 / nodes
    )


@pytest.mark.parametrize(
    "dense",
    [
        blocks(30, 0),
        blocks(150, 1),
        blocks(150, 2) + blocks(150, 2).T,
        torch.block_diag(blocks(100, 3), 3 * blocks(90, 4)),
        -blocks(40, 5),
        torch.diag(torch.ones(199, dtype=torch.float64), 1),  # a path: nilpotent
        torch.diag(torch.ones(149, dtype=torch.float64), 1) + torch.diag(torch.ones(149, dtype=torch.float64), -1),
        torch.zeros(5, 5, dtype=torch.float64),
    ],
    ids=["small", "directed", "undirected", "components", "negative", "nilpotent", "bipartite", "empty"],
)
def test_spectral_radius_is_that_of_the_magnitudes(dense):
    exact = 0.0 if bool((dense.tril() == 0).all()) else float(torch.linalg.eigvals(dense.abs()).abs().max())
    assert spectral_radius(matrix_of(dense)) == pytest.approx(exact, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(
    ("edges", "weights", "message"),
    [
        ([[0], [3]], [1.0], r"0\.\.2"),
        ([[-1], [0]], [1.0], "zero-based"),
        ([[0], [1]], [float("nan")], "1 of 1 edge weights are NaN"),
        ([[0], [1]], [float("inf")], "infinite"),
        ([[0, 1], [1, 0]], [1.0], "E weights"),
    ],
)
def test_bad_edges_are_named(edges, weights, message):
    with pytest.raises(DataError, match=message):
        sparse_matrix(torch.tensor(edges), torch.tensor(weights), (3, 3))


def test_bad_edges_are_named_before_normalising():
    with pytest.raises(DataError, match=r"0\.\.1"):
        normalized_adjacency(torch.tensor([[0], [2]]), 2, "symmetric")
    with pytest.raises(ValueError, match="scaling='twice'"):
        normalized_adjacency(torch.tensor([[0], [1]]), 2, "twice")


def test_shards_cover_every_item_once():
    ranks = [Shard(rank=rank, world=3, micro=2).parts_of_all(7, "7 graphs") for rank in range(3)]
    assert [i for micro in zip(*ranks, strict=True) for part in micro for i in part] == list(range(7))
    with pytest.raises(ValueError, match="3 processes cannot share 2 graphs: use fewer processes or a larger batch"):
        Shard(rank=0, world=3).parts_of_all(2, "2 graphs")
