"""COX2, PROTEINS and other sets of labelled graphs in the TU format, in ten folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from data.digests import digest_of_files
from data.graphs.folds import Folds, check_fold, fold_size, official_fold, official_names, stratified_fold
from data.graphs.graph import Graph, Scaling, union
from data.graphs.refinement import merge_nodes
from data.graphs.tu_files import METADATA, Raw, read_tu
from data.paths import data_root
from data.seeding import generator
from phantom.engine.errors import DataError
from phantom.engine.source import Shard, Source, Spec, share
from phantom.validate import check_choice, check_count, check_flag, check_number

Adjacency = Literal["doubled", "same"]
Batch = tuple[Graph, Tensor]  # the union of G graphs, labels (G,)


class TUGraphs(Source):
    """Classify graphs of one TU data set; one fold of ten is the test split.

    Node features are the one-hot node labels, from the smallest label to the largest, including empty columns. A set
    without node labels has its node attributes as features, and one with neither a 1 at every node. Attributes beside
    labels are not used. The adjacency is A + I, normalised symmetrically. Batches that are the same in every epoch are
    built once.

    The official protocol has no validation split (`validation=0`) and reports the best test epoch, which is optimistic.
    `validation=0.1` holds out a stratified tenth of the training graphs as `valid`, to choose the epoch without the
    test graphs.

    Args:
        root: folder that holds `raw/`. None means $PHANTOM_DATA/<name>, or the cache folder without that variable.
        name: COX2, PROTEINS, or any other TU set (stratified folds only).
        folds: `official` (recorded for COX2 and PROTEINS; in effect random) or `stratified`.
        fold: the test fold, 0 to 9.
        batch_size: graphs per optimiser step.
        shuffle: draw a new order every epoch; the official code keeps one order.
        validation: share of the training graphs held out.
        eval_adjacency: `same` as in training, or `doubled`: 2A + I, as in the official evaluation.
        merge_nodes: merge nodes that message passing cannot distinguish (refinement.py): exact, on fewer nodes.
        split_seed: seed of stratified folds, their training order and the validation graphs; one for all ten folds.
        seed: seed of the order of every epoch, under `shuffle`.
        download: download the files into `root` if any is missing; otherwise nothing is written there.

    Raises:
        ValueError: an argument is out of range, or the official folds of `name` are not known.
        DataError: the files are missing or damaged.
    """

    kind = "graph_classification"

    def __init__(
        self,
        *,
        root: str | None,
        name: str,
        folds: Folds,
        fold: int,
        batch_size: int,
        shuffle: bool,
        validation: float,
        eval_adjacency: Adjacency,
        merge_nodes: bool,
        split_seed: int,
        seed: int,
        download: bool,
    ) -> None:
        check_fold(fold)
        check_choice("folds", folds, get_args(Folds))
        check_choice("eval_adjacency", eval_adjacency, get_args(Adjacency))
        if folds == "official" and name not in official_names():
            raise ValueError(
                f"folds='official' is known for {', '.join(official_names())}, not for {name!r}: use folds=stratified"
            )
        check_number("validation", validation, "[0, 1)", also=": a share of the training graphs")
        check_count("batch_size", batch_size, least=1)
        check_flag("merge_nodes", merge_nodes)
        self.root = data_root(root, name)
        self.name, self.folds, self.fold, self.split_seed, self.seed = name, folds, fold, split_seed, seed
        self.batch_size, self.shuffle, self.validation = batch_size, shuffle, validation
        doubled: Scaling = "doubled" if eval_adjacency == "doubled" else "symmetric"
        self.scaling: dict[str, Scaling] = {"train": "symmetric", "eval": doubled}
        self.merge_nodes, self.download = merge_nodes, download
        self.splits = ("train", "valid", "test") if validation > 0 else ("train", "test")
        self._graphs: dict[tuple[str, int], Graph] = {}
        self._batches: dict[Any, Batch] = {}
        self._raw: Raw | None = None
        self._ids: dict[str, list[int]] | None = None
        self._device = torch.device("cpu")
        metadata = METADATA.get(name) or self.raw.metadata
        test = fold_size(metadata.num_graphs, fold)
        valid = round(validation * (metadata.num_graphs - test))
        sizes = {"train": metadata.num_graphs - test - valid, "valid": valid, "test": test}
        self.spec = Spec(
            kind=self.kind,
            inputs={"in_features": metadata.in_features, "num_classes": metadata.num_classes},
            sizes={split: sizes[split] for split in self.splits},
        )

    @property
    def raw(self) -> Raw:
        """The graphs, read from the files at the first use."""
        if self._raw is None:
            self._raw = self.read()
            if self.name in METADATA and self._raw.metadata != METADATA[self.name]:
                raise DataError(
                    f"{self.root / 'raw'} holds {self._raw.metadata}, but {self.name} is {METADATA[self.name]}: the "
                    "files are damaged or of another version; remove them and set data.download=true"
                )
        return self._raw

    def read(self) -> Raw:
        """Return the graphs, from the files in `root`."""
        return read_tu(self.root, self.name, download=self.download)

    @property
    def ids(self) -> dict[str, list[int]]:
        """The graph ids of every split; those of `train` are in training order."""
        if self._ids is None:
            if self.folds == "official":
                train, test = official_fold(self.name, self.fold)
            else:
                train, test = stratified_fold(self.raw.labels, self.fold, self.split_seed)
            valid = self._held_out(train)
            held_out = set(valid)
            self._ids = {"train": [i for i in train if i not in held_out], "valid": valid, "test": test}
        return self._ids

    def digests(self) -> dict[str, str]:
        assert self.raw  # which refuses files that are missing
        return dict.fromkeys(self.splits, digest_of_files((self.root / "raw").glob(f"{self.name}_*.txt")))

    def to(self, device: torch.device) -> None:
        """Hold the batches on `device` from now on."""
        self._device = torch.device(device)
        self._batches = {key: _move(batch, self._device) for key, batch in self._batches.items()}

    def steps(self, epoch: int) -> int:
        return -(-self.spec.sizes["train"] // self.batch_size)

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Batch]]:
        ids = self.ids["train"]
        if self.shuffle:
            order = torch.randperm(len(ids), generator=generator(f"order/{self.seed}/{epoch}"))
            ids = [ids[i] for i in order.tolist()]
        for step in range(start, self.steps(epoch)):
            chosen = ids[step * self.batch_size : (step + 1) * self.batch_size]
            parts = shard.parts_of_all(len(chosen), f"a batch of {len(chosen)} graphs")
            yield [self._batch([chosen[i] for i in part], "train", keep=not self.shuffle) for part in parts]

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[Batch]:
        self.check_split(split)
        ids = self.ids[split]
        part = share(range(len(ids)), shard.rank, shard.world)
        for begin in part[:: self.batch_size]:
            yield self._batch(ids[begin : min(begin + self.batch_size, part.stop)], "eval", keep=True)

    def _held_out(self, train: list[int]) -> list[int]:
        count = round(self.validation * len(train))
        if count == 0:
            return []
        from sklearn.model_selection import train_test_split

        labels = self.raw.labels[train].numpy()
        try:
            return list(train_test_split(train, test_size=count, stratify=labels, random_state=self.split_seed)[1])
        except ValueError as error:
            raise DataError(
                f"validation={self.validation} of {len(train)} training graphs cannot have graphs of every class "
                f"({error}): use another share, or validation=0"
            ) from error

    def _batch(self, ids: Sequence[int], use: str, *, keep: bool) -> Batch:
        key = (use, *ids)
        if key in self._batches:
            return self._batches[key]
        graphs = [self._graph(self.scaling[use], i) for i in ids]
        batch = _move((union(graphs), self.raw.labels[list(ids)]), self._device)
        if keep:
            self._batches[key] = batch
        return batch

    def _graph(self, scaling: Scaling, index: int) -> Graph:
        if (scaling, index) not in self._graphs:
            graph = self.raw.graph(index, scaling)
            self._graphs[scaling, index] = merge_nodes(graph) if self.merge_nodes else graph
        return self._graphs[scaling, index]


def _move(batch: Batch, device: torch.device) -> Batch:
    graph, labels = batch
    return graph.to(device), labels.to(device)
