"""The reference text that ships with CPython (`pydoc_data.topics`), a small corpus for language modelling."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from data.digests import digest
from data.seeding import seed_of
from data.text.streams import Corpus, TokenStreams
from data.text.vocabulary import Vocabulary

# a word, or one punctuation mark
TOKEN = re.compile(r"\w+|[^\w\s]")
MIN_COUNT = 2


class PyDocs(TokenStreams):
    """The topics of Python's `help()`: about 120,000 tokens, no download; the text depends on the version of Python.

    A hash of its name puts about one topic in ten into valid, and one in ten into test. Lines follow the rules of
    `data.text.vocabulary`; every punctuation mark is a word. A word that occurs only once in the training topics
    becomes `<unk>`, and so does an unknown word of the other splits.

    Args:
        streams, eval_streams, segment: see `TokenStreams`.
    """

    def load(self) -> Corpus:
        from pydoc_data.topics import topics

        names: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        for name in sorted(topics):
            names[{0: "valid", 1: "test"}.get(seed_of(f"pydocs/{name}") % 10, "train")].append(name)

        def lines(split: str) -> Iterator[list[str]]:
            for name in names[split]:
                for line in topics[name].splitlines():
                    yield TOKEN.findall(line)

        vocabulary = Vocabulary.from_lines(lines("train"), "pydocs", min_count=MIN_COUNT)
        tokens = {
            split: np.array(
                [i for line in vocabulary.encode(lines(split), oov="unk", source=f"pydocs {split}") for i in line],
                dtype=np.int32,
            )
            for split in names
        }
        digests = {split: digest(topics[name].encode() for name in names[split]) for split in names}
        return Corpus(tokens, vocabulary.counts, digests)
