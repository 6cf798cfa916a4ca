"""TU data sets: folds, fixed batches, evaluation adjacency, and damaged files; real COX2 and PROTEINS where present."""

import json
import os
from pathlib import Path

import pytest
import torch

from data.graphs.folds import official_fold
from data.graphs.tu import TUGraphs
from data.graphs.tu_files import METADATA
from data.paths import data_root
from phantom.engine.errors import DataError
from phantom.engine.source import Shard

SETTINGS = {
    "root": None,
    "name": "COX2",
    "folds": "official",
    "fold": 0,
    "batch_size": 128,
    "shuffle": False,
    "validation": 0.0,
    "eval_adjacency": "doubled",
    "merge_nodes": False,
    "split_seed": 42,
    "seed": 0,
    "download": False,
}
REFERENCE = Path(os.environ.get("PHANTOM_REFERENCE") or ".") / "ignn_official_folds.json"


def here(name: str) -> bool:
    return (data_root(None, name) / "raw" / f"{name}_A.txt").is_file()


def source(**changes) -> TUGraphs:
    return TUGraphs(**{**SETTINGS, **changes})


def positive(graph: int) -> bool:
    return graph // 4 % 4 == 0


@pytest.fixture
def toy(tmp_path):
    """Forty cycles of 3 to 6 nodes in TU files, twelve of class 1; nodes of labels 2 and 4, and an attribute."""
    raw = tmp_path / "raw"
    raw.mkdir()
    arcs, indicator, node_labels, first = [], [], [], 1
    for graph in range(40):
        size = 3 + graph % 4
        arcs += [f"{first + i}, {first + (i + 1) % size}\n{first + (i + 1) % size}, {first + i}" for i in range(size)]
        indicator += [str(graph + 1)] * size
        node_labels += ["2" if i else "4" for i in range(size)]
        first += size
    files = {
        "A": arcs,
        "graph_indicator": indicator,
        "node_labels": node_labels,
        "graph_labels": ["1" if positive(graph) else "-1" for graph in range(40)],
        "node_attributes": ["0.5"] * len(indicator),
    }
    for name, lines in files.items():
        (raw / f"TOY_{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def toy_source(root, **changes) -> TUGraphs:
    return source(**{"root": str(root), "name": "TOY", "folds": "stratified", "batch_size": 8, **changes})


def test_the_spec_needs_no_files():
    spec = source(root="/nowhere", fold=7).spec
    assert spec.inputs == {"in_features": 35, "num_classes": 2} and spec.sizes == {"train": 421, "test": 46}
    assert source(root="/nowhere", name="PROTEINS", validation=0.1).spec.sizes == {
        "train": 901,
        "valid": 100,
        "test": 112,
    }


@pytest.mark.parametrize("name", ["COX2", "PROTEINS"])
def test_official_folds_partition_the_graphs(name):
    count = METADATA[name].num_graphs
    tests = [official_fold(name, fold)[1] for fold in range(10)]
    assert sorted(graph for test in tests for graph in test) == list(range(count))
    for fold, test in enumerate(tests):
        train = official_fold(name, fold)[0]
        assert sorted(train + test) == list(range(count))
        assert len(test) == source(root="/nowhere", name=name, fold=fold).spec.sizes["test"]


@pytest.mark.skipif(not REFERENCE.is_file(), reason="PHANTOM_REFERENCE does not name a folder with the official folds")
@pytest.mark.parametrize("name", ["COX2", "PROTEINS"])
def test_official_folds_are_the_recorded_ones(name):
    recorded = json.loads(REFERENCE.read_text())[name]
    for fold, test in enumerate(recorded["test_graph_ids_zero_based"]):
        train, ours = official_fold(name, fold)
        assert ours == test
        assert train == [graph for graph in recorded["permutation"] if graph not in set(test)]


def test_files_are_read(toy):
    s = toy_source(toy)
    assert s.spec.inputs == {"in_features": 3, "num_classes": 2}, "label columns run from 2 to 4; no attributes"
    (graph, labels), *_ = s.evaluate("test", shard=Shard())
    assert graph.pooling.to_dense().shape == (4, graph.num_nodes) and labels.shape == (4,)
    first = s.ids["test"][0]
    size = 3 + first % 4
    assert graph.pooling.to_dense()[0].sum() == size
    assert torch.equal(graph.features[:size].sum(dim=0), torch.tensor([size - 1.0, 0.0, 1.0]))
    assert labels[0] == int(positive(first))
    assert not (toy / "processed").exists(), "nothing is written where the files are"


def test_stratified_folds_have_the_shares_of_the_whole(toy):
    tests = []
    for fold in range(10):
        s = toy_source(toy, fold=fold, validation=0.25)
        ids = s.ids
        assert sorted(ids["train"] + ids["valid"] + ids["test"]) == list(range(40))
        assert {split: len(ids[split]) for split in s.splits} == s.spec.sizes == {"train": 27, "valid": 9, "test": 4}
        assert sum(map(positive, ids["test"])) in (1, 2) and sum(map(positive, ids["valid"])) in (2, 3)
        tests += ids["test"]
    assert sorted(tests) == list(range(40))
    assert toy_source(toy, seed=7).ids == toy_source(toy).ids, "folds do not depend on the seed of a run"


def graph_sizes(steps) -> list[int]:
    return [int(n) for parts in steps for graph, _ in parts for n in graph.pooling.to_dense().sum(dim=1)]


def test_every_training_graph_once_and_resumable(toy):
    for shuffle in (False, True):
        s = toy_source(toy, shuffle=shuffle)
        order = [3 + i % 4 for i in s.ids["train"]]
        whole = list(s.train(epoch=1, start=0, shard=Shard()))
        assert len(whole) == s.steps(1) == 5
        assert sorted(graph_sizes(whole)) == sorted(order) and (graph_sizes(whole) == order) != shuffle
        later = list(toy_source(toy, shuffle=shuffle).train(epoch=1, start=3, shard=Shard()))
        assert graph_sizes(later) == graph_sizes(whole[3:])
        again = list(s.train(epoch=2, start=0, shard=Shard()))
        assert (again[0][0] is whole[0][0]) != shuffle, "fixed batches are built once"


def test_ranks_and_micro_batches_share_a_batch(toy):
    s = toy_source(toy)
    whole = next(iter(s.train(epoch=0, start=0, shard=Shard())))
    ranks = [next(iter(s.train(epoch=0, start=0, shard=Shard(rank=r, world=2, micro=2)))) for r in (0, 1)]
    parts = [part for micro in zip(*ranks, strict=True) for part in micro]
    assert len(parts) == 4 and graph_sizes([parts]) == graph_sizes([whole])
    tested = [
        int(y) for r in range(3) for _, labels in s.evaluate("test", shard=Shard(rank=r, world=3)) for y in labels
    ]
    assert tested == [int(positive(i)) for i in s.ids["test"]]


def test_the_evaluation_adjacency_is_a_switch(toy):
    def edge(eval_adjacency: str, evaluate: bool) -> float:
        s = toy_source(toy, eval_adjacency=eval_adjacency)
        graph = next(
            iter(s.evaluate("test", shard=Shard())) if evaluate else iter(s.train(epoch=0, start=0, shard=Shard()))
        )
        graph = graph[0] if evaluate else graph[0][0]
        return round(float(graph.adjacency.to_dense()[0, 1]), 4)

    assert edge("doubled", False) == edge("same", False) == edge("same", True) == round(1 / 3, 4)
    assert edge("doubled", True) == round(2 / 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fold": 10}, "fold=10 must be an integer 0..9"),
        ({"fold": None}, "fold=None"),
        ({"folds": "random"}, "folds='random'.*official, stratified"),
        ({"eval_adjacency": "half"}, "eval_adjacency='half'"),
        ({"name": "MUTAG"}, "folds=stratified"),
        ({"validation": 1.0}, "validation=1.0"),
        ({"merge_nodes": "yes"}, "merge_nodes='yes' must be true or false"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        source(**change)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"lacks COX2_A.txt.*data\.root.*data\.download"):
        next(iter(source(root=str(tmp_path)).evaluate("test", shard=Shard())))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("A", "1, 9999\n", "cannot be read"),
        ("A", "one, two\n", "cannot be read"),
        ("graph_labels", "1\n-1\n", "describes"),
    ],
)
def test_damaged_files_are_named(toy, file, text, message):
    (toy / "raw" / f"TOY_{file}.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        toy_source(toy)


def test_another_set_of_the_same_name_is_refused(toy):
    for path in (toy / "raw").iterdir():
        path.rename(path.with_name(path.name.replace("TOY", "COX2")))
    with pytest.raises(DataError, match="damaged or of another version"):
        next(iter(source(root=str(toy)).evaluate("test", shard=Shard())))


@pytest.mark.parametrize(
    ("name", "nodes", "positives"), [("COX2", 19_252, 102), ("PROTEINS", 43_471, 450)], ids=["COX2", "PROTEINS"]
)
def test_the_real_sets(name, nodes, positives):
    if not here(name):
        pytest.skip(f"{data_root(None, name)} holds no {name}: set PHANTOM_DATA to check the real set")
    s = source(name=name, fold=3)
    batches = [b for split in ("train", "test") for b in s.evaluate(split, shard=Shard())]
    assert sum(graph.num_nodes for graph, _ in batches) == nodes
    assert sum(int(labels.sum()) for _, labels in batches) == positives
    assert all(graph.adjacency.rows is graph.adjacency.columns for graph, _ in batches), "undirected"
    assert all(torch.equal(graph.features.sum(dim=1), torch.ones(graph.num_nodes)) for graph, _ in batches)


def test_merged_nodes_count_as_often_as_they_were(toy):
    """A ring of n nodes with one marked has n // 2 + 1 classes; features and labels of a graph sum as before."""
    for first in (
        lambda source: next(source.train(epoch=0, start=0, shard=Shard()))[0],
        lambda source: next(source.evaluate("test", shard=Shard())),
    ):
        (graph, labels), (fewer, same) = (first(toy_source(toy, merge_nodes=merge)) for merge in (False, True))
        pooling, merged = graph.pooling.to_dense(), fewer.pooling.to_dense()
        sizes = pooling.sum(dim=1)
        assert fewer.num_nodes == int((sizes // 2 + 1).sum()) < graph.num_nodes
        assert torch.equal(merged.sum(dim=1), sizes) and torch.equal(labels, same)
        assert torch.equal(merged @ fewer.features, pooling @ graph.features)


def test_graphs_without_edges_and_isolated_nodes(toy):
    """A node without edges keeps its self-loop, in a graph of others or in one where no node has any, the last too."""
    path = toy / "raw" / "TOY_A.txt"
    sizes = [3 + graph % 4 for graph in range(40)]
    first = [1 + sum(sizes[:graph]) for graph in range(41)]
    bare = {node for graph in (10, 39) for node in range(first[graph], first[graph + 1])} | {first[5] + 1}
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not bare & set(map(int, line.split(",")))) + "\n")
    raw = toy_source(toy).raw
    graphs = [raw.graph(index, "symmetric") for index in range(40)]
    assert [graph.num_nodes for graph in graphs] == sizes
    for empty in (10, 39):
        assert torch.equal(graphs[empty].adjacency.to_dense(), torch.eye(sizes[empty]))
    isolated = graphs[5].adjacency.to_dense()[1]
    assert isolated[1] == 1 and isolated.sum() == 1
    # the other nodes of the cycle are now a path, and other graphs are as they were
    assert (graphs[5].adjacency.to_dense() > 0).sum() == 1 + (sizes[5] - 1) + 2 * (sizes[5] - 2)
    assert (graphs[11].adjacency.to_dense() > 0).sum() == 3 * sizes[11]


@pytest.mark.parametrize(
    ("line", "message"),
    [("0, 2", "a node id below 1"), ("7,-1", "a node id below 1"), ("3, 4", "1 edges that leave their graph")],
)
def test_an_edge_out_of_its_graph_is_named(toy, line, message):
    path = toy / "raw" / "TOY_A.txt"
    path.write_text(path.read_text() + f"{line}\n")
    with pytest.raises(DataError, match=rf"TOY_A.txt.*{message}"):
        toy_source(toy)


@pytest.mark.parametrize(
    ("labels", "attributes", "features"), [(False, 2, 2), (False, 0, 1), (True, 2, 3), (False, 1, 1), (True, 0, 3)]
)
def test_sets_without_node_labels_or_with_node_attributes(toy, labels, attributes, features):
    """Labels come first, then attributes, then a constant; the graphs themselves are the same."""
    expected = toy_source(toy).raw
    raw, nodes = toy / "raw", expected.features.shape[0]
    values = torch.arange(nodes * max(attributes, 1)).view(nodes, -1) / 7
    (raw / "TOY_node_attributes.txt").unlink()
    if attributes:
        lines = [", ".join(f"{value:.4f}" for value in row) for row in values.tolist()]
        (raw / "TOY_node_attributes.txt").write_text("\n".join(lines) + "\n")
    if not labels:
        (raw / "TOY_node_labels.txt").unlink()
    source = toy_source(toy)
    found = source.raw
    assert source.spec.inputs == {"in_features": features, "num_classes": 2}
    wanted = expected.features if labels else values if attributes else torch.ones(nodes, 1)
    torch.testing.assert_close(found.features, wanted, atol=1e-4, rtol=0)
    for name in ("edges", "nodes", "arcs", "labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert next(source.train(epoch=0, start=0, shard=Shard()))[0][0].features.shape[1] == features


def test_an_attribute_that_is_no_number_is_named(toy):
    (toy / "raw" / "TOY_node_labels.txt").unlink()
    file = toy / "raw" / "TOY_node_attributes.txt"
    file.write_text(file.read_text().replace("0.5", "nan", 1))
    with pytest.raises(DataError, match=r"TOY_node_attributes.txt holds NaN"):
        toy_source(toy)


def test_a_last_line_without_a_newline_is_refused(toy):
    path = toy / "raw" / "TOY_A.txt"
    path.write_text(path.read_text().rstrip("\n"))
    with pytest.raises(DataError, match=r"TOY_A\.txt does not end in a newline"):
        next(iter(toy_source(toy).evaluate("test", shard=Shard())))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([2, 2, 2, 1, 1, 1, 3], "puts node 1 into graph 2, where graph 1 is due"),
        ([1, 1, 3, 3], "puts node 3 into graph 3, where graph 2 is due"),
        ([0, 0, 1], "puts node 1 into graph 0, where graph 1 is due"),
        ([1, 2, 1], "puts node 3 into graph 1, where graph 3 is due"),
    ],
    ids=["swapped", "a graph without nodes", "from zero", "mixed"],
)
def test_nodes_that_are_not_listed_graph_by_graph_are_named(toy, order, message):
    """Where graphs have no edges, nothing else would show that they have the features of others."""
    path = toy / "raw" / "TOY_graph_indicator.txt"
    path.write_text("".join(f"{graph}\n" for graph in order))
    with pytest.raises(DataError, match=rf"TOY_graph_indicator\.txt {message}: list the nodes"):
        toy_source(toy)


@pytest.mark.parametrize("name", ["A", "graph_indicator", "graph_labels", "node_labels", "node_attributes"])
@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_file_is_named(toy, name, text):
    (toy / "raw" / f"TOY_{name}.txt").write_text(text)
    with pytest.raises(DataError, match=rf"TOY_{name}\.txt is empty"):
        toy_source(toy)


def test_a_node_without_a_label_is_an_error(toy):
    path = toy / "raw" / "TOY_node_labels.txt"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:-2]))
    (toy / "raw" / "TOY_node_attributes.txt").unlink()
    with pytest.raises(DataError, match="describes 180 nodes by graph and 178 by labels or attributes"):
        toy_source(toy)


def test_shares_too_small_for_every_class_are_sentences(toy):
    with pytest.raises(DataError, match=r"validation=0\.03 of 36 training graphs cannot have graphs of every class"):
        next(iter(toy_source(toy, validation=0.03).train(epoch=0, start=0, shard=Shard())))
    path = toy / "raw" / "TOY_graph_labels.txt"
    path.write_text("".join(f"{i % 8}\n" for i in range(40)))
    with pytest.raises(DataError, match="cannot be cut into 10 folds by class"):
        next(iter(toy_source(toy).train(epoch=0, start=0, shard=Shard())))


def test_a_converted_copy_beside_the_files_is_not_read(toy):
    """torch_geometric, which downloads, would unpickle it: it may come with the files, and run code."""

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {toy / 'pwned'}",)

    (toy / "processed").mkdir()
    for name in ("pre_transform.pt", "pre_filter.pt", "data.pt"):
        torch.save(Payload(), toy / "processed" / name)
    (toy / "raw" / "TOY_graph_labels.txt").unlink()
    with pytest.raises(DataError, match=r"lacks TOY_graph_labels\.txt|could not be downloaded"):
        source(root=str(toy), name="TOY", folds="stratified", download=True)
    assert not (toy / "pwned").exists()
