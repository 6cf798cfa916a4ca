"""A generated data set of PPI's shape, for development and tests without the real files."""

from __future__ import annotations

import torch
from torch import Tensor

from data.digests import digest_of_tensors
from data.graphs.ppi import NODES, NUM_FEATURES, NUM_LABELS, Batch, LabelledGraphs, labelled_graph
from data.seeding import generator
from phantom.validate import check_number

COMMUNITIES = 16
DRAWS = 38.0  # edge ends drawn per node; dropping repeats leaves about 27 neighbours, as in PPI
SAME_COMMUNITY = 0.8  # share of edges drawn within a community: homophily
POSITIVES = 0.3  # mean share of positive labels, about that of PPI


class SyntheticPPI(LabelledGraphs):
    """Label the nodes of homophilous random graphs: 20/2/2 graphs with PPI's node counts, 50 features, 121 labels.

    Nodes belong to communities, whose features scatter around a common mean; degrees are heavy-tailed, and most edges
    stay within a community. Label l of node i is 1 if w_l . (mean features of i's neighbours) exceeds a threshold that
    sets the label's share of positives: the neighbours decide the label, not the node itself. All graphs share means, w
    and thresholds, so that a model can generalise from one graph to another.

    Args:
        scale: factor on the number of nodes of every graph; 1 is PPI's size.
        generation_seed: seed of the graphs, features and labels.

    Raises:
        ValueError: `scale` is not positive.
    """

    def __init__(self, *, scale: float, generation_seed: int, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        check_number("scale", scale, "> 0", also=": 1 is the size of PPI")
        self.scale, self.generation_seed = scale, generation_seed
        common = generator(f"ppi_synthetic/{generation_seed}")
        self._means = torch.randn(COMMUNITIES, NUM_FEATURES, generator=common)
        self._directions = torch.randn(NUM_FEATURES, NUM_LABELS, generator=common) / NUM_FEATURES**0.5
        shares = 2 * POSITIVES * torch.rand(NUM_LABELS, generator=common)
        self._thresholds = self._thresholds_for(shares)

    def digests(self) -> dict[str, str]:
        # everything else follows from these and the generator that drew them
        return dict.fromkeys(self.splits, digest_of_tensors((self._means, self._directions, self._thresholds)))

    def load(self, split: str) -> list[Batch]:
        sizes = [max(2, round(self.scale * nodes)) for nodes in NODES[split]]
        return [self._graph(nodes, split, i) for i, nodes in enumerate(sizes)]

    def _graph(self, nodes: int, split: str, index: int) -> Batch:
        features, edges, scores = self._draw(nodes, generator(f"ppi_synthetic/{self.generation_seed}/{split}/{index}"))
        return labelled_graph(features, edges, (scores > self._thresholds).float())

    def _draw(self, nodes: int, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (N, p), both directions of every edge (2, E), and the scores (N, labels)."""
        community = torch.randint(COMMUNITIES, (nodes,), generator=draws).sort().values
        features = self._means[community] + torch.randn(nodes, NUM_FEATURES, generator=draws)
        edges = self._edges(community, draws)
        degree = torch.bincount(edges[1], minlength=nodes).clamp_min(1)
        sums = torch.zeros(nodes, NUM_FEATURES).index_add_(0, edges[1], features[edges[0]])
        return features, edges, sums / degree[:, None] @ self._directions

    def _edges(self, community: Tensor, draws: torch.Generator) -> Tensor:
        nodes = community.numel()
        weight = torch.randn(nodes, generator=draws, dtype=torch.float64).exp()
        total = torch.cat([weight.new_zeros(1), weight.cumsum(0)])
        count = round(min(DRAWS, nodes - 1) * nodes / 2)

        def draw(low: Tensor, high: Tensor) -> Tensor:
            at = low + (high - low) * torch.rand(count, generator=draws, dtype=torch.float64)
            return torch.searchsorted(total, at, right=True).sub(1).clamp(0, nodes - 1)

        start, end = total[:1].expand(count), total[-1:].expand(count)
        source = draw(start, end)
        # nodes are sorted by community, so the weights of each community form an interval of `total`
        bounds = torch.searchsorted(community, torch.arange(COMMUNITIES + 1))
        group = community[source]
        inside = torch.rand(count, generator=draws) < SAME_COMMUNITY
        target = draw(
            torch.where(inside, total[bounds[group]], start), torch.where(inside, total[bounds[group + 1]], end)
        )
        pairs = torch.stack([torch.minimum(source, target), torch.maximum(source, target)])
        pairs = torch.unique(pairs[:, source != target], dim=1)
        return torch.cat([pairs, pairs.flip(0)], dim=1)

    def _thresholds_for(self, shares: Tensor) -> Tensor:
        # take the quantiles on one graph of fixed size, so that the task is the same at every scale
        scores = self._draw(2000, generator(f"ppi_synthetic/{self.generation_seed}/thresholds"))[2]
        return torch.stack([scores[:, i].quantile(1 - share) for i, share in enumerate(shares)])
