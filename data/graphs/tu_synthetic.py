"""Generated graphs in the shape of a TU set, with its folds, for rehearsals where its files are not at hand."""

from __future__ import annotations

import torch

from data.digests import digest_of_tensors
from data.graphs.tu import TUGraphs
from data.graphs.tu_files import METADATA, Metadata, Raw
from data.seeding import generator

NODES = 12


class SyntheticTU(TUGraphs):
    """As many graphs, node labels and classes as the TU set `name` has, each graph a ring of 12 nodes.

    The node labels of a graph of class c are drawn from the c-th of equal parts of all labels, where there are enough:
    a model can learn the class from them.

    Args:
        name: COX2 or PROTEINS.
        others: see `TUGraphs`.

    Raises:
        ValueError: as `TUGraphs`, or the sizes of `name` are not known.
    """

    def read(self) -> Raw:
        if self.name not in METADATA:
            known = ", ".join(METADATA)
            raise ValueError(f"name must be one of {known}, got {self.name!r}: the sizes of others are not known")
        metadata = METADATA[self.name]
        draws = generator(f"synthetic {self.name}")
        labels = torch.arange(metadata.num_graphs) % metadata.num_classes
        order = torch.randperm(metadata.num_graphs, generator=draws)
        return _rings(metadata, labels[order], draws)

    def digests(self) -> dict[str, str]:
        raw = self.raw
        return dict.fromkeys(self.splits, digest_of_tensors((raw.features, raw.edges, raw.labels)))


def _rings(metadata: Metadata, labels: torch.Tensor, draws: torch.Generator) -> Raw:
    count = metadata.num_graphs
    part = max(1, metadata.in_features // metadata.num_classes)
    low = (labels * part).clamp(max=metadata.in_features - part).repeat_interleave(NODES)
    nodes = low + torch.randint(part, (count * NODES,), generator=draws)
    here = torch.arange(NODES)
    following = (here + 1) % NODES
    ring = torch.stack([torch.cat([here, following]), torch.cat([following, here])])
    offsets = torch.arange(count + 1)
    return Raw(
        features=torch.nn.functional.one_hot(nodes, metadata.in_features).float(),
        edges=ring.repeat(1, count),
        nodes=offsets * NODES,
        arcs=offsets * 2 * NODES,
        labels=labels,
    )
