"""The embedded corpus: complete, split by topic, the same every time, no file and no network."""

import re
from pydoc_data.topics import topics

import numpy as np

from data.text.pydocs import PyDocs
from phantom.engine.source import Shard


def make() -> PyDocs:
    return PyDocs(streams=16, eval_streams=4, segment=32)


def test_every_topic_is_in_one_split():
    source = make()
    assert source.splits == ("train", "valid", "test")
    lines = sum(len(text.splitlines()) for text in topics.values())
    marks = sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in topics.values())
    assert sum(source.spec.sizes.values()) == lines + marks
    assert source.spec.sizes["train"] > 0.7 * (lines + marks)
    assert min(source.spec.sizes.values()) > 2000


def test_vocabulary_is_that_of_the_training_topics():
    source = make()
    size = source.spec.inputs["vocab_size"]
    counts = np.bincount(source._tokens["train"], minlength=size)
    assert len(counts) == size and counts.min() >= 2
    assert (np.diff(counts[1:]) <= 0).all()  # <eos>, then by frequency
    assert max(tokens.max() for tokens in source._tokens.values()) < size
    unk = 1 + int(np.flatnonzero(counts[1:] == _rare_words())[0])
    assert (source._tokens["valid"] == unk).sum() > 0


def _rare_words() -> int:
    from collections import Counter

    from data.seeding import seed_of

    train = [text for name, text in sorted(topics.items()) if seed_of(f"pydocs/{name}") % 10 > 1]
    counter = Counter(word for text in train for line in text.splitlines() for word in re.findall(r"\w+|[^\w\s]", line))
    return sum(count == 1 for count in counter.values())


def test_the_same_every_time():
    first, second = make(), make()
    for split in first.splits:
        assert np.array_equal(first._tokens[split], second._tokens[split])
        assert len(list(first.evaluate(split, shard=Shard()))) > 0
    assert 100 < first.spec.baseline["valid"] < 500
