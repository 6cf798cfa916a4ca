"""PPI: label the proteins of 24 tissue graphs, read by torch_geometric; and the base class of sets of its shape."""

from __future__ import annotations

import os
import pickle
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.digests import digest_of_files
from data.graphs.geometric import without_deprecations
from data.graphs.graph import (
    RADIUS_MARGIN,
    Graph,
    sparse_matrix,
    spectral_radius,
    union,
)
from data.paths import cache_folder, data_root, root_hint
from data.seeding import generator, seed_of
from phantom.engine.errors import DataError
from phantom.engine.source import Shard, Source, Spec, share
from phantom.validate import check_counts

Batch = tuple[Graph, Tensor]  # a union of graphs, labels (N, 121) of zeros and ones

NUM_FEATURES, NUM_LABELS = 50, 121
UNREADABLE = (KeyError, IndexError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)
FILES = ("feats.npy", "graph_id.npy", "graph.json", "labels.npy")
# number of nodes of every graph, in file order
NODES = {
    "train": (
        *(1767, 1377, 2263, 2339, 1578, 1021, 1823, 2488, 591, 3312),
        *(2401, 1878, 1819, 3480, 2794, 2326, 2650, 2815, 3163, 3021),
    ),
    "valid": (3230, 3284),
    "test": (3224, 2300),
}


class LabelledGraphs(Source):
    """Label the nodes of 20 training, 2 validation and 2 test graphs; every training epoch has a new order.

    The adjacency is 1 for every edge of the list and 0 elsewhere, without self-loops or normalisation. The loader
    computes its spectral radius once per graph. A batch is the disjoint union of its graphs, with the largest radius.

    Args:
        batch_size: graphs per optimiser step (1 in the official code).
        eval_batch_size: graphs per evaluation batch (2 in the official code).
        seed: seed of the training order.

    Raises:
        ValueError: a batch size is not positive.
    """

    kind = "node_labelling"
    splits: tuple[str, ...] = ("train", "valid", "test")

    def __init__(self, *, batch_size: int, eval_batch_size: int, seed: int) -> None:
        check_counts(least=1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.spec = Spec(
            kind=self.kind,
            inputs={"in_features": NUM_FEATURES, "num_labels": NUM_LABELS},
            sizes={split: len(nodes) for split, nodes in NODES.items()},
        )
        self._loaded: dict[str, list[Batch]] = {}
        self._device = torch.device("cpu")

    @abstractmethod
    def load(self, split: str) -> list[Batch]:
        """Return every graph of `split` with its labels."""

    @abstractmethod
    def digests(self) -> dict[str, str]:
        """Return a short hash of what every split is made from."""

    def graphs(self, split: str) -> list[Batch]:
        """Return every graph of `split` with its labels, loaded at the first use."""
        if split not in self._loaded:
            loaded = self.load(split)
            self._loaded[split] = [(graph.to(self._device), labels.to(self._device)) for graph, labels in loaded]
        return self._loaded[split]

    def to(self, device: torch.device) -> None:
        """Hold the graphs on `device` from now on."""
        self._device, self._loaded = torch.device(device), {}

    def steps(self, epoch: int) -> int:
        return -(-self.spec.sizes["train"] // self.batch_size)

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Batch]]:
        graphs = self.graphs("train")
        order = torch.randperm(len(graphs), generator=generator(f"order/{self.seed}/{epoch}")).tolist()
        for step in range(start, self.steps(epoch)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            parts = shard.parts_of_all(len(chosen), f"a batch of {len(chosen)} graphs")
            yield [_join([graphs[i] for i in chosen], part) for part in parts]

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[Batch]:
        self.check_split(split)
        graphs = self.graphs(split)
        for begin in range(0, len(graphs), self.eval_batch_size):
            batch = graphs[begin : begin + self.eval_batch_size]
            part = share(range(len(batch)), shard.rank, shard.world)
            if part:
                yield _join(batch, part)


class PPI(LabelledGraphs):
    """The protein-protein interaction graphs of Zitnik and Leskovec (2017), read by torch_geometric.

    Files: <root>/raw/train_graph.json and so on. torch_geometric converts them once, into the cache folder, so `root`
    may be read-only.

    Args:
        root: folder that holds `raw/`. None means $PHANTOM_DATA/PPI, or the cache folder without that variable.
        download: download the files into `root` if any is missing.

    Raises:
        DataError: the files are missing or damaged.
    """

    def __init__(self, *, root: str | None, batch_size: int, eval_batch_size: int, seed: int, download: bool) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        self.root, self.download = data_root(root, "PPI"), download

    def digests(self) -> dict[str, str]:
        self.graphs("train")  # which refuses files that are missing
        return {
            split: digest_of_files(self.root / "raw" / f"{split}_{file}" for file in FILES) for split in self.splits
        }

    def load(self, split: str) -> list[Batch]:
        with without_deprecations():
            from torch_geometric.datasets import PPI as Original

        raw = self.root / "raw"
        names = [f"{part}_{file}" for part in NODES for file in FILES]
        missing = [name for name in names if not (raw / name).is_file()]
        if missing and not self.download:
            raise DataError(
                f"{raw} lacks {', '.join(missing)}. {root_hint('PPI')}, or download the files with data.download=true"
            )
        sizes = [] if missing else [(name, (raw / name).stat().st_size) for name in names]
        converted = cache_folder() / f"ppi-{seed_of(f'{raw.resolve()}/{sizes}'):x}"

        class Converted(Original):
            raw_dir = property(lambda _: os.fspath(raw))
            processed_dir = property(lambda _: os.fspath(converted))

        _drop_code(converted)
        name = "val" if split == "valid" else split
        try:
            try:
                data: Any = Converted(os.fspath(self.root), name)
            except UNREADABLE:  # what was converted before may be damaged, by a power cut for one
                data = Converted(os.fspath(self.root), name, force_reload=True)
        except UNREADABLE as error:
            raise DataError(f"{raw} cannot be downloaded or read as PPI: {error}") from error
        shape = (len(data), data.num_features, data[0].y.shape[1])
        if shape != (len(NODES[split]), NUM_FEATURES, NUM_LABELS):
            raise DataError(
                f"{raw} holds {shape[0]} {split} graphs with {shape[1]} features and {shape[2]} labels, but PPI has "
                f"{len(NODES[split])} with {NUM_FEATURES} and {NUM_LABELS}: the files are damaged or of another set"
            )
        return [labelled_graph(item.x, item.edge_index, item.y) for item in data]


def _drop_code(converted: Path) -> None:
    """Remove of an earlier conversion what holds more than tensors: torch_geometric would run the code in it."""
    if converted.is_symlink():  # to a folder with files of something else
        converted.unlink()
    for path in converted.glob("*.pt"):
        try:
            # it unpickles those that begin so, whatever they hold, and does without them
            keep = not path.name.startswith("pre_") and not path.is_symlink()
            if keep:
                torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE:
            keep = False
        if not keep:
            path.unlink(missing_ok=True)


def labelled_graph(features: Tensor, edges: Tensor, labels: Tensor) -> Batch:
    """Return the graph with weight 1 on every edge of `edges` (2, E), and its labels.

    Raises:
        DataError: an edge, a feature or a label is invalid.
    """
    if labels.shape[0] != features.shape[0]:
        raise DataError(f"{features.shape[0]} nodes have features and {labels.shape[0]} have labels: they must agree")
    for name, values in (("features", features), ("labels", labels)):
        if not bool(torch.isfinite(values).all()):
            raise DataError(f"the {name} hold NaN or infinite entries: every entry must be finite")
    count = features.shape[0]
    adjacency = sparse_matrix(edges, torch.ones(edges.shape[1]), (count, count))
    radius = spectral_radius(adjacency) + RADIUS_MARGIN
    return Graph(features=features.float(), adjacency=adjacency, radius=radius), labels.float()


def _join(batch: list[Batch], part: range) -> Batch:
    """Return a part of a batch, with the radius of the whole: it bounds W, which all parts and ranks must share."""
    radius = max(graph.radius for graph, _ in batch)
    items = [batch[i] for i in part]
    if len(items) == 1:
        return replace(items[0][0], radius=radius), items[0][1]
    return replace(union([graph for graph, _ in items]), radius=radius), torch.cat([labels for _, labels in items])
