"""PPI as torch_geometric reads it, from a tiny copy of its files; and the generated set of its shape."""

import json
from subprocess import check_call

import numpy as np
import pytest
import torch

from data.graphs.ppi import NODES, PPI, _join, labelled_graph
from data.graphs.ppi_synthetic import SyntheticPPI
from phantom.engine.errors import DataError
from phantom.engine.source import Shard

BATCHES = {"batch_size": 1, "eval_batch_size": 2, "seed": 0}


def synthetic(**changes) -> SyntheticPPI:
    return SyntheticPPI(**{"scale": 0.05, "generation_seed": 0, **BATCHES, **changes})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Twenty, two and two paths of 4 nodes, with a self-loop on each first node, in PPI's files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw = tmp_path / "PPI" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, sizes in NODES.items():
        count = 4 * len(sizes)
        links = [{"source": i, "target": i + 1} for i in range(count - 1) if i % 4 < 3]
        links += [{"source": i, "target": i} for i in range(0, count, 4)]
        nodes = [{"id": i} for i in range(count)]
        graph = {"directed": False, "multigraph": False, "graph": {}, "nodes": nodes, "links": links}
        (raw / f"{split}_graph.json").write_text(json.dumps(graph))
        np.save(raw / f"{split}_graph_id.npy", 1 + np.arange(count) // 4)
        np.save(raw / f"{split}_feats.npy", random.standard_normal((count, 50)))
        np.save(raw / f"{split}_labels.npy", random.integers(0, 2, (count, 121)))
    return tmp_path / "PPI"


def test_ppi_reads_its_files_and_writes_elsewhere(files):
    source = PPI(root=str(files), download=False, **BATCHES)
    assert source.spec.inputs == {"in_features": 50, "num_labels": 121}
    graph, labels = next(iter(source.evaluate("test", shard=Shard())))
    path = torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)
    assert torch.equal(graph.adjacency.to_dense(), torch.block_diag(path, path)), "no self-loops, both directions, raw"
    assert graph.radius == pytest.approx(float(torch.linalg.eigvalsh(path).max()) + 1e-5, abs=1e-6)
    expected = np.load(files / "raw" / "test_labels.npy")
    assert torch.equal(labels, torch.from_numpy(expected).float())
    assert len(list(source.train(epoch=0, start=0, shard=Shard()))) == 20
    assert [path.name for path in files.iterdir()] == ["raw"]


@pytest.mark.parametrize("split", list(NODES))
def test_a_split_has_its_own_features_and_labels(files, split):
    """Against the file of that name: the graphs of a split are those of no other."""
    source = PPI(root=str(files), download=False, **BATCHES)
    if split == "train":
        graphs = [part for (part,) in source.train(epoch=0, start=0, shard=Shard())]
    else:
        graphs = list(source.evaluate(split, shard=Shard()))
    for i, name in enumerate(("feats", "labels")):
        found = torch.cat([part[1] if i else part[0].features for part in graphs])
        rows = torch.from_numpy(np.load(files / "raw" / f"{split}_{name}.npy")).float()
        # training graphs come in an order of their own
        expected = sorted(rows.tolist()) if split == "train" else rows.tolist()
        assert (sorted(found.tolist()) if split == "train" else found.tolist()) == expected


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: content[:3000] + bytes(3000)],
    ids=["empty", "half", "zeros"],
)
def test_a_damaged_copy_is_converted_again(files, damage):
    def read() -> torch.Tensor:
        return torch.cat([graph.features for graph, _ in PPI(root=str(files), download=False, **BATCHES).load("train")])

    before = read()
    copies = list((files.parent / "cache").rglob("*.pt"))
    assert copies
    for path in copies:
        path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(read(), before)


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return check_call, (["touch", str(self.path)],)


@pytest.mark.parametrize("name", ["pre_transform.pt", "pre_filter.pt", "train.pt"])
def test_a_cache_folder_from_elsewhere_runs_no_code(files, name):
    """torch_geometric unpickles `pre_transform.pt` as it is, and the others where torch refuses them."""
    before = PPI(root=str(files), download=False, **BATCHES).load("train")
    (copy,) = (files.parent / "cache").rglob(name)
    torch.save(Payload(files / "pwned"), copy)
    after = PPI(root=str(files), download=False, **BATCHES).load("train")
    assert not (files / "pwned").exists()
    assert all(torch.equal(a[0].features, b[0].features) for a, b in zip(before, after, strict=True))


def test_a_converted_folder_that_is_a_link_leads_nowhere(files):
    PPI(root=str(files), download=False, **BATCHES).load("test")
    (folder,) = (files.parent / "cache" / "phantom").glob("ppi-*")
    other = folder.rename(files.parent / "other")
    (other / "mine.pt").write_bytes(b"precious")
    folder.symlink_to(other)
    PPI(root=str(files), download=False, **BATCHES).load("test")
    assert (other / "mine.pt").read_bytes() == b"precious" and not folder.is_symlink()


def test_an_intact_copy_is_not_converted_again(files):
    PPI(root=str(files), download=False, **BATCHES).load("train")
    (copy,) = (files.parent / "cache").rglob("train.pt")
    before = copy.stat().st_mtime_ns
    PPI(root=str(files), download=False, **BATCHES).load("train")
    assert copy.stat().st_mtime_ns == before


def test_missing_and_damaged_files_are_named(files):
    np.save(files / "raw" / "test_labels.npy", np.zeros((8, 7)))
    with pytest.raises(DataError, match="7 labels, but PPI has"):
        next(iter(PPI(root=str(files), download=False, **BATCHES).evaluate("test", shard=Shard())))
    (files / "raw" / "valid_graph.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be downloaded or read"):
        next(iter(PPI(root=str(files), download=False, **BATCHES).evaluate("test", shard=Shard())))
    (files / "raw" / "valid_graph.json").unlink()
    with pytest.raises(DataError, match=r"lacks valid_graph.json.*PHANTOM_DATA"):
        next(iter(PPI(root=str(files), download=False, **BATCHES).evaluate("test", shard=Shard())))


def test_bad_features_labels_and_edges_are_named():
    features, edges, labels = torch.zeros(3, 50), torch.tensor([[0, 1], [1, 0]]), torch.zeros(3, 121)
    labelled_graph(features, edges, labels)
    with pytest.raises(DataError, match="features hold NaN"):
        labelled_graph(features.index_fill(0, torch.tensor(1), float("nan")), edges, labels)
    with pytest.raises(DataError, match="they must agree"):
        labelled_graph(features, edges, labels[:2])
    with pytest.raises(DataError, match=r"0\.\.2"):
        labelled_graph(features, edges + 2, labels)


def test_the_generated_set_has_the_shape_of_ppi():
    source = synthetic()
    for split, sizes in NODES.items():
        items = source.graphs(split)
        assert [graph.num_nodes for graph, _ in items] == [round(0.05 * nodes) for nodes in sizes]
        for graph, labels in items:
            assert graph.features.shape[1] == 50 and labels.shape == (graph.num_nodes, 121)
            dense = graph.adjacency.to_dense()
            assert (
                torch.equal(dense, dense.T) and dense.diagonal().sum() == 0 and set(dense.unique().tolist()) == {0, 1}
            )
    share = torch.cat([labels for _, labels in source.graphs("train")]).mean()
    assert 0.2 < share < 0.4
    assert sum(NODES["train"]) == 44_906 and sum(NODES["valid"]) == 6_514 and sum(NODES["test"]) == 5_524


def test_the_neighbours_decide_the_labels():
    source = synthetic()
    graph, labels = source.graphs("train")[0]
    dense = graph.adjacency.to_dense()
    mean = dense @ graph.features / dense.sum(dim=1, keepdim=True).clamp_min(1)
    scores = mean @ source._directions
    assert torch.equal(labels, (scores > source._thresholds).float())
    own = (graph.features @ source._directions > source._thresholds).float()
    assert (own == labels).float().mean() < 0.9, "a node's own features are not enough"


def test_the_generated_set_is_a_function_of_its_seed():
    first, again, other = (synthetic(generation_seed=s).graphs("test")[0] for s in (0, 0, 1))
    assert torch.equal(first[0].features, again[0].features) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0].features, other[0].features)


def test_an_epoch_shuffles_all_graphs_and_resumes():
    source = synthetic(batch_size=3)

    def sizes(epoch: int, start: int = 0, shard: Shard = Shard()) -> list[list[int]]:  # noqa: B008 - frozen
        return [[part[0].num_nodes for part in parts] for parts in source.train(epoch=epoch, start=start, shard=shard)]

    whole = sizes(0)
    assert len(whole) == source.steps(0) == 7 and whole != sizes(1) and sizes(0, start=4) == whole[4:]
    nodes = [round(0.05 * n) for n in NODES["train"]]
    assert sum(sum(parts) for parts in whole) == sum(nodes)
    halves = [sizes(0, shard=Shard(rank=rank, world=2)) for rank in range(2)]
    assert [sum(a) + sum(b) for a, b in zip(*halves, strict=True)] == [sum(parts) for parts in whole]
    with pytest.raises(DataError, match="4 processes cannot share a batch of 3 graphs"):
        sizes(0, shard=Shard(rank=0, world=4))


def test_impossible_settings():
    for change, message in (({"scale": 0}, "scale=0"), ({"batch_size": 0}, "batch_size=0")):
        with pytest.raises(ValueError, match=message):
            synthetic(**change)


def test_a_share_of_a_batch_has_the_radius_of_the_whole():
    def complete(count: int):
        edges = torch.tensor([[i, j] for i in range(count) for j in range(count) if i != j]).T
        return labelled_graph(torch.zeros(count, 3), edges, torch.zeros(count, 2))

    small, large = complete(3), complete(6)
    for part in (range(0, 1), range(1, 2), range(2)):
        assert _join([small, large], part)[0].radius == large[0].radius > small[0].radius
