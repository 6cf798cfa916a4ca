"""Adaptive input embedding and adaptive softmax over one vocabulary ordered by frequency, with tied weights.

V words in buckets; bucket i holds n_i words at width w_i = D // div_val^i, D the model's width.
Sources: Baevski and Auli, *Adaptive Input Representations for Neural Language Modeling* (2019); Grave et al.,
*Efficient softmax approximation for GPUs* (2017); the layout of the DEQ Transformer's official code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phantom.validate import check_count


class AdaptiveEmbedding(nn.Module):
    """Embed tokens: sqrt(D) P_i e, where e is the token's row in its bucket's table and P_i is (D, w_i).

    Frequent words get wide rows. Every bucket has a projection, including the first. The operations do not depend on
    the buckets that a batch touches: no host synchronisation, and every parameter has a gradient at every step.

    Args:
        vocab_size: V.
        d_model: D.
        cutoffs: index of the first word of every bucket but the first, increasing.
        div_val: ratio of the widths of neighbouring buckets.
        init_std: tables and projections are drawn from N(0, init_std^2).

    Raises:
        ValueError: the cutoffs do not fit the vocabulary, or a bucket would have width 0.
    """

    def __init__(self, *, vocab_size: int, d_model: int, cutoffs: Sequence[int], div_val: int, init_std: float) -> None:
        super().__init__()
        cutoffs = tuple(cutoffs)
        edges = (0, *cutoffs, vocab_size)
        if any(isinstance(c, bool) or not isinstance(c, int) for c in cutoffs) or any(
            a >= b for a, b in itertools.pairwise(edges)
        ):
            raise ValueError(
                f"cutoffs={list(cutoffs)} do not fit a vocabulary of {vocab_size} words: they must be increasing "
                f"integers from 1 to {vocab_size - 1}; set model.cutoffs to fit the data"
            )
        check_count("div_val", div_val, least=1)
        widths = [d_model // div_val**i for i in range(len(edges) - 1)]
        if widths[-1] < 1:
            raise ValueError(
                f"div_val={div_val} leaves no width for bucket {len(widths) - 1}: with d_model={d_model} the widths "
                f"would be {widths}; use fewer cutoffs or a smaller div_val"
            )
        self.d_model = d_model
        self.edges = edges
        self.tables = nn.ParameterList(
            torch.empty(b - a, w).normal_(0, init_std) for (a, b), w in zip(self.buckets, widths, strict=True)
        )
        self.projections = nn.ParameterList(torch.empty(d_model, w).normal_(0, init_std) for w in widths)

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """The word range (begin, end) of every bucket; `end` is exclusive."""
        return list(itertools.pairwise(self.edges))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (..., D) for `tokens` (...).

        Raises:
            IndexError: a token is not in the vocabulary; on a GPU its assertion fails.
        """
        rows = []
        for table, (begin, end) in zip(self.tables, self.buckets, strict=True):
            inside, size = (tokens >= begin) & (tokens < end), end - begin
            # words of other buckets read any row; what is in no bucket stays outside of the first or the last table
            low, high = 0 if begin else -1, size - 1 if end < self.edges[-1] else size
            row = F.embedding((tokens - begin).clamp(low, high), table)
            rows.append(row * inside[..., None])
        return F.linear(torch.cat(rows, dim=-1), torch.cat(list(self.projections), dim=1)) * self.d_model**0.5


class AdaptiveSoftmax(nn.Module):
    """Negative log-likelihood under a two-level softmax that shares the weights of an `AdaptiveEmbedding`.

    The head scores the words of bucket 0 and one column per further bucket: h P_0' [table_0; clusters]^T + b. A word of
    bucket i >= 1 has log p = log p_head(cluster i) + log_softmax(h P_i table_i^T + b_i). Cluster i's column is the i-th
    from the end, as in the official code. The embedding owns the tables and the projections from bucket 1 on, and their
    gradients from both uses add; the softmax owns P_0'. Each tail is evaluated for the words of its bucket only, which
    costs one device-to-host synchronisation per call.
    """

    def __init__(self, embedding: AdaptiveEmbedding, *, init_std: float) -> None:
        super().__init__()
        num_clusters = len(embedding.tables) - 1
        width = embedding.tables[0].shape[1]
        self.head_projection = nn.Parameter(torch.empty(embedding.d_model, width).normal_(0, init_std))
        self.cluster_weight = nn.Parameter(torch.empty(num_clusters, width).normal_(0, init_std))
        self.cluster_bias = nn.Parameter(torch.zeros(num_clusters))
        self.biases = nn.ParameterList(torch.zeros(end - begin) for begin, end in embedding.buckets)

    def forward(self, hidden: Tensor, targets: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Return -log p(target) (...), in the order of `targets` (...), for `hidden` (..., D)."""
        h, target = hidden.flatten(0, -2), targets.flatten()
        first, num_clusters = embedding.edges[1], len(self.cluster_bias)
        bucket = sum((target >= begin).long() for begin, _ in embedding.buckets[1:]) + torch.zeros_like(target)
        logits = F.linear(
            h @ self.head_projection,
            torch.cat([embedding.tables[0], self.cluster_weight]),
            torch.cat([self.biases[0], self.cluster_bias]),
        )
        column = torch.where(bucket == 0, target, first + num_clusters - bucket)
        nll = F.cross_entropy(logits, column, reduction="none")
        labels = torch.arange(num_clusters + 1, device=target.device)
        counts = (bucket[:, None] == labels).sum(dim=0).tolist()  # device-to-host sync
        order = torch.argsort(bucket, stable=True).split(counts)
        # do not skip empty buckets: DistributedDataParallel needs a (zero) gradient for their parameters
        for i, (begin, _) in enumerate(embedding.buckets[1:], start=1):
            index = order[i]
            tail = F.linear(h[index] @ embedding.projections[i], embedding.tables[i], self.biases[i])
            nll = nll.index_add(0, index, F.cross_entropy(tail, target[index] - begin, reduction="none"))
        return nll.view(targets.shape)
