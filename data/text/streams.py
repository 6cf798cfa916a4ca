"""Language modelling data: a text as parallel streams, read in lockstep segment by segment.

N tokens, B streams, n = N // B tokens per stream. Stream b is the b-th contiguous slice of the text; the tail is
dropped. Segments begin at 0, s, 2s, ..., and the last one is short. Token i + 1 is the target of token i. Segments do
not overlap, and are neither shuffled nor padded.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phantom.engine.errors import DataError
from phantom.engine.source import Shard, Source, Spec, share
from phantom.validate import check_counts

Batch = tuple[Tensor, Tensor]  # tokens and targets, (B, L) int64 each
log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """A text as word indices.

    Args:
        tokens: (N,) int32 per split, including `train`; may be memory-mapped.
        counts: (V,) occurrences of every word of the vocabulary in the training text.
        digests: a short hash of the text of every split.
    """

    tokens: Mapping[str, np.ndarray]
    counts: Sequence[int]
    digests: Mapping[str, str]


class TokenStreams(Source):
    """A text split into streams; ranks and micro-batches divide the streams, so their number changes no stream.

    The task carries a memory from one segment to the next, so every epoch keeps the order of the text. Training reads
    the training split as `streams` streams; evaluation reads it as `eval_streams` streams, like any other split.

    Args:
        streams: B in training, over all processes.
        eval_streams: B in evaluation.
        segment: tokens per stream and step.

    Raises:
        DataError: a split is too short for one segment of every stream.
    """

    kind = "language_modelling"

    def __init__(self, *, streams: int, eval_streams: int, segment: int) -> None:
        check_counts(least=1, streams=streams, eval_streams=eval_streams, segment=segment)
        self.streams, self.segment = streams, segment
        self._tokens, counts, digests = self.load()
        self.splits = tuple(self._tokens)
        self._train = self._cut("train", streams, "streams")
        self._eval = {split: self._cut(split, eval_streams, "eval_streams") for split in self.splits}
        self.spec = Spec(
            kind=self.kind,
            inputs={"vocab_size": len(counts)},
            sizes={split: len(tokens) for split, tokens in self._tokens.items()},
            baseline={
                split: unigram_perplexity(counts, tokens[:, 1:])
                for split, tokens in self._eval.items()
                if split != "train"  # the model is fitted to it
            },
            digests=dict(digests),
        )
        log.info(
            "%s: %d words; tokens: %s; perplexity of the add-one unigram model: %s",
            type(self).__name__,
            len(counts),
            ", ".join(f"{split} {size}" for split, size in self.spec.sizes.items()),
            ", ".join(f"{split} {value:.2f}" for split, value in self.spec.baseline.items()),
        )

    @abstractmethod
    def load(self) -> Corpus:
        """Return the tokens, the word counts and the digests."""

    def steps(self, epoch: int) -> int:
        return len(self._starts(self._train))

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Batch]]:
        parts = shard.parts_of_all(self.streams, f"streams={self.streams}")
        for begin in self._starts(self._train)[start:]:
            yield [self._segment(self._train[part.start : part.stop], begin) for part in parts]

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[Batch]:
        self.check_split(split)
        streams = self._eval[split]
        part = share(range(len(streams)), shard.rank, shard.world)
        if part:
            for begin in self._starts(streams):
                yield self._segment(streams[part.start : part.stop], begin)

    def _cut(self, split: str, count: int, name: str) -> np.ndarray:
        """Return the streams (B, n) of a split, a view."""
        tokens = self._tokens[split]
        length = len(tokens) // count
        if length < self.segment + 1:
            raise DataError(
                f"segment={self.segment} is longer than a stream of the split {split!r}: its {len(tokens)} tokens, cut "
                f"into {name}={count}, are {length} each, and the last is only a target; use a shorter segment or "
                "fewer streams"
            )
        return tokens[: count * length].reshape(count, length)

    def _starts(self, streams: np.ndarray) -> range:
        return range(0, streams.shape[1] - 1, self.segment)

    def _segment(self, streams: np.ndarray, begin: int) -> Batch:
        # the last segment of a stream is short; the last token is only a target
        piece = torch.from_numpy(streams[:, begin : begin + self.segment + 1].astype(np.int64))
        return piece[:, :-1].contiguous(), piece[:, 1:].contiguous()


def unigram_perplexity(counts: Sequence[int], targets: np.ndarray) -> float:
    """Return the perplexity of `targets` under the context-free model p(w) = (counts[w] + 1) / (sum of counts + V)."""
    log_p = np.log(np.asarray(counts, dtype=np.float64) + 1) - math.log(sum(counts) + len(counts))
    frequency = np.bincount(targets.ravel(), minlength=len(counts))
    return math.exp(-float(frequency @ log_p) / targets.size)
