"""A generated text with a vocabulary of any size, for rehearsals where the real corpus is not at hand."""

from __future__ import annotations

import numpy as np

from data.digests import digest
from data.text.streams import Corpus, TokenStreams
from phantom.validate import check_counts


class SyntheticText(TokenStreams):
    """Words drawn one by one: word r of the vocabulary, counted from 0, has a probability in proportion to 1 / (r + 1).

    Nothing in it tells the next word but the frequencies, whose perplexity is `baseline` in every record.

    Args:
        vocab_size: V, the words that there are; most never occur.
        num_train, num_eval: tokens of the training split, and of valid and test each.
        generation_seed: of the text.
        streams, eval_streams, segment: see `TokenStreams`.

    Source: the frequencies are Zipf's law (1935).
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_train: int,
        num_eval: int,
        generation_seed: int,
        streams: int,
        eval_streams: int,
        segment: int,
    ) -> None:
        check_counts(least=2, vocab_size=vocab_size, num_train=num_train, num_eval=num_eval)
        self._vocab_size, self._generation_seed = vocab_size, generation_seed
        self._sizes = {"train": num_train, "valid": num_eval, "test": num_eval}
        super().__init__(streams=streams, eval_streams=eval_streams, segment=segment)

    def load(self) -> Corpus:
        weights = 1 / np.arange(1, self._vocab_size + 1)
        draws = np.random.default_rng(self._generation_seed)
        tokens = {
            split: draws.choice(self._vocab_size, size=size, p=weights / weights.sum()).astype(np.int32)
            for split, size in self._sizes.items()
        }
        counts = np.bincount(tokens["train"], minlength=self._vocab_size).tolist()
        return Corpus(tokens, counts, {split: digest([array.tobytes()]) for split, array in tokens.items()})
