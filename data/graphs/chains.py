"""The Chains task: a label at the first node of a chain must reach its last one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from data.digests import digest_of_tensors
from data.graphs.graph import RADIUS_MARGIN, Graph, normalized_adjacency, spectral_radius
from phantom.engine.source import Shard, Source, Spec, share
from phantom.validate import check_counts

Batch = tuple[Graph, Tensor, Tensor]  # the graph, labels (N,), the nodes to score (S,)


class Chains(Source):
    """Classify the nodes of directed chains: the first node's features give the class, all others are zero.

    Nodes are ordered by class, chain and position. The adjacency is A + I with edges i -> i + 1, scaled by the row sums
    on both sides; every row of features is divided by its sum. The loader generates the data exactly as the official
    IGNN code, which fixes `length` at 10. Every batch is the whole graph, with the nodes of the split to score.

    Args:
        length: nodes per chain.
        chains_per_class: 20 in the official code.
        num_classes: each class sets one feature column.
        num_features: feature columns; those beyond `num_classes` are zero.
        train_nodes, valid_nodes, test_nodes: sizes of the splits, cut from one shuffled order.
        seed: seed of the shuffled order.

    Raises:
        ValueError: a size is not positive, or the splits need more nodes than the chains have.

    Source: Gu et al., *Implicit Graph Neural Networks* (2020).
    """

    kind = "node_classification"
    splits: tuple[str, ...] = ("train", "valid", "test")

    def __init__(
        self,
        *,
        length: int,
        chains_per_class: int,
        num_classes: int,
        num_features: int,
        train_nodes: int,
        valid_nodes: int,
        test_nodes: int,
        seed: int,
    ) -> None:
        sizes = {"train": train_nodes, "valid": valid_nodes, "test": test_nodes}
        check_counts(least=1, length=length, chains_per_class=chains_per_class, num_classes=num_classes)
        check_counts(least=1, **{f"{split}_nodes": size for split, size in sizes.items()})
        if num_features < num_classes:
            raise ValueError(f"num_features={num_features!r} must be at least num_classes={num_classes}")
        self.shape = (num_classes, chains_per_class, length, num_features)
        self.num_nodes = num_classes * chains_per_class * length
        if sum(sizes.values()) > self.num_nodes:
            raise ValueError(
                f"the splits need {sum(sizes.values())} nodes, {num_classes} classes of {chains_per_class} chains of "
                f"length={length} have {self.num_nodes}: use a greater length or smaller splits"
            )
        self.seed = seed
        self.spec = Spec(kind=self.kind, inputs={"in_features": num_features, "num_classes": num_classes}, sizes=sizes)
        self._data: tuple[Graph, Tensor, dict[str, Tensor]] | None = None

    @property
    def data(self) -> tuple[Graph, Tensor, dict[str, Tensor]]:
        """The graph, the labels (N,) and the nodes of every split, generated at the first use."""
        if self._data is None:
            self._data = self._generate()
        return self._data

    def digests(self) -> dict[str, str]:
        graph, labels, nodes = self.data
        whole = (graph.features, *graph.adjacency.rows, labels)
        return {split: digest_of_tensors((*whole, part)) for split, part in nodes.items()}

    def to(self, device: torch.device) -> None:
        """Keep the graph on `device`."""
        graph, labels, nodes = self.data
        self._data = graph.to(device), labels.to(device), {split: part.to(device) for split, part in nodes.items()}

    def steps(self, epoch: int) -> int:
        return 1

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Batch]]:
        graph, labels, nodes = self.data
        count = self.spec.sizes["train"]
        parts = shard.parts_of_all(count, f"a batch of {count} nodes")
        if start == 0:
            yield [(graph, labels, nodes["train"][list(part)]) for part in parts]

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[Batch]:
        self.check_split(split)
        graph, labels, nodes = self.data
        part = share(range(self.spec.sizes[split]), shard.rank, shard.world)
        if part:
            yield graph, labels, nodes[split][part.start : part.stop]

    def _generate(self) -> tuple[Graph, Tensor, dict[str, Tensor]]:
        import numpy as np

        classes, chains, length, columns = self.shape
        random = np.random.RandomState(self.seed)
        # draw the official code's zero-width noise too: it advances the generator, so the node order below is the same
        features = random.uniform(-0.0, 0.0, size=self.shape)
        features[np.arange(classes), :, 0, np.arange(classes)] += 1
        features = torch.from_numpy(features.reshape(self.num_nodes, columns)).float()
        sums = features.sum(dim=1, keepdim=True)
        features = torch.where(sums != 0, features / sums, 0.0)
        order = np.arange(self.num_nodes)
        random.shuffle(order)
        sizes = list(self.spec.sizes.values())
        nodes = torch.from_numpy(order[: sum(sizes)]).split(sizes)

        first = torch.arange(self.num_nodes).reshape(-1, length)[:, :-1].reshape(-1)
        adjacency = normalized_adjacency(torch.stack([first, first + 1]), self.num_nodes, "symmetric")
        graph = Graph(features=features, adjacency=adjacency, radius=spectral_radius(adjacency) + RADIUS_MARGIN)
        labels = torch.arange(classes).repeat_interleave(chains * length)
        return graph, labels, dict(zip(self.spec.sizes, nodes, strict=True))
