"""Chains: the recorded length-10 set exactly, other lengths by construction."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.graphs.chains import Chains
from phantom.engine.source import Shard

FILE = Path(os.environ.get("PHANTOM_REFERENCE") or ".") / "ignn_layer.npz"
SETTINGS = {
    "length": 10,
    "chains_per_class": 20,
    "num_classes": 2,
    "num_features": 100,
    "train_nodes": 20,
    "valid_nodes": 100,
    "test_nodes": 200,
    "seed": 42,
}


@pytest.mark.skipif(not FILE.is_file(), reason="PHANTOM_REFERENCE does not name a folder with ignn_layer.npz")
def test_the_official_set():
    with np.load(FILE) as file:
        arrays = {name: torch.tensor(file[name]) for name in file.files if name.startswith("chains.")}
    graph, labels, nodes = Chains(**SETTINGS).data
    adjacency = torch.zeros(400, 400)
    adjacency[arrays["chains.adj_rows"], arrays["chains.adj_cols"]] = arrays["chains.adj_vals"]
    features = torch.zeros(400, 100)
    features[tuple(arrays["chains.features_nonzero"].T)] = arrays["chains.features_nonzero_vals"]
    assert torch.equal(graph.adjacency.to_dense(), adjacency)
    assert torch.equal(graph.features, features)
    assert torch.equal(labels, arrays["chains.labels"])
    for ours, theirs in (("train", "train"), ("valid", "val"), ("test", "test")):
        assert torch.equal(nodes[ours], arrays[f"chains.idx_{theirs}"])
    assert graph.radius == pytest.approx(float(arrays["chains.f64.adj_rho"]), abs=1e-9)


def test_other_lengths():
    source = Chains(**{**SETTINGS, "length": 30, "num_classes": 3})
    graph, labels, nodes = source.data
    assert graph.num_nodes == 1800 and torch.equal(labels, torch.arange(3).repeat_interleave(600))
    first = torch.arange(0, 1800, 30)
    assert torch.equal(graph.features.sum(dim=1).nonzero()[:, 0], first)
    assert torch.equal(graph.features[first, :3].argmax(dim=1), labels[first])
    dense = graph.adjacency.to_dense()
    assert (dense.diagonal(1) > 0).sum() == 60 * 29 and dense.tril(-1).abs().sum() == 0
    assert float(dense[0, 1]) == 0.5 and float(dense[28, 29]) == pytest.approx(0.5**0.5) and float(dense[29, 29]) == 1
    chosen = torch.cat(list(nodes.values()))
    assert len(chosen.unique()) == 320 and graph.radius == pytest.approx(1.00001)


def test_ranks_share_the_nodes():
    source = Chains(**SETTINGS)
    assert source.steps(0) == 1 and list(source.train(epoch=0, start=1, shard=Shard())) == []
    nodes = source.data[2]
    shards = [Shard(rank=rank, world=3, micro=2) for rank in range(3)]
    ranks = [next(source.train(epoch=0, start=0, shard=shard)) for shard in shards]
    trained = [part[2] for micro in zip(*ranks, strict=True) for part in micro]
    assert len(trained) == 6 and torch.equal(torch.cat(trained), nodes["train"])
    tested = [batch[2] for shard in shards for batch in source.evaluate("test", shard=shard)]
    assert torch.equal(torch.cat(tested), nodes["test"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"length": 5}, "the splits need 320 nodes"),
        ({"num_features": 1}, "num_features=1"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Chains(**{**SETTINGS, **change})


def test_the_order_of_the_nodes_is_the_official_one():
    """The official code draws noise of width zero first, which moves the generator on."""
    assert Chains(**SETTINGS).data[2]["train"][:5].tolist() == [239, 253, 182, 104, 216]
