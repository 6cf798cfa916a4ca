"""WikiText: the vocabulary's rules, the streams, sharding, preparation on disk, and every kind of bad input."""

import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.text.streams import Corpus, TokenStreams, unigram_perplexity
from data.text.vocabulary import Vocabulary, read_words
from data.text.wikitext import WikiText103
from phantom.engine.errors import DataError
from phantom.engine.source import Shard
from tests.plans import plan

TRAIN = " = A title = \n\nthe cat sat on\u00a0the mat <unk>\nthe dog and the cat and the bird ran on and on\n" * 6
VALID = "the cat ran\n\nthe bird sat\non the mat <unk> dog\n" * 4
FILES = {"train": "wiki.train.tokens", "valid": "wiki.valid.tokens"}


def write(folder: Path, train: str = TRAIN, valid: str = VALID) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (("wiki.train.tokens", train), ("wiki.valid.tokens", valid)):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def make(root: Path, **options) -> WikiText103:
    arguments = {
        "root": str(root),
        "download": False,
        "files": FILES,
        "oov": "error",
        "allow_partial": True,
        "eval_tokens": None,
        "cache": str(root / "cache"),
        "streams": 4,
        "eval_streams": 3,
        "segment": 5,
    } | options
    return WikiText103(**arguments)


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "corpus")


def test_vocabulary_rules():
    lines = [line.split() for line in ("b a", "", "c a b", " d\te \u2003 c")]
    vocabulary = Vocabulary.from_lines(lines, "x")
    # by count, ties by first occurrence; <eos> first, one per line, the blank one too
    assert vocabulary.words == ("<eos>", "b", "a", "c", "d", "e")
    assert vocabulary.counts == (4, 2, 2, 2, 1, 1)
    encoded = list(vocabulary.encode(lines, oov="error", source="text"))
    assert encoded == [[1, 2, 0], [0], [3, 2, 1, 0], [4, 5, 3, 0]]


def test_rare_words_become_unk_with_their_count():
    vocabulary = Vocabulary.from_lines([["a", "b", "a"], ["c", "a", "d"]], "x", min_count=2)
    assert dict(zip(vocabulary.words, vocabulary.counts, strict=True)) == {"<eos>": 2, "a": 3, "<unk>": 3}
    assert list(vocabulary.encode([["d", "a"]], oov="unk", source="text")) == [[2, 1, 0]]


def test_lines_are_physical_lines(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("a\u2028b\x0bc\r\nd\n\ne".encode())
    assert list(read_words(path)) == [["a", "b", "c"], ["d"], [], ["e"]]


def test_tokens_are_mapped_from_disk_and_prepared_once(root):
    source = make(root)
    assert source.spec.kind == source.kind == "language_modelling"
    words = [word for line in TRAIN.splitlines() for word in [*line.split(), "<eos>"]]
    assert source.spec.sizes == {"train": len(words), "valid": 4 * (3 + 1 + 1 + 3 + 1 + 5 + 1)}
    assert source.spec.inputs == {"vocab_size": len(set(words))}
    assert source.splits == ("train", "valid")
    assert all(isinstance(array, np.memmap) and array.dtype == np.int32 for array in source._tokens.values())
    prepared = sorted((root / "cache").rglob("*.*"))
    assert [path.suffix for path in prepared] == [".npy", ".npy", ".json"]
    times = [path.stat().st_mtime_ns for path in prepared]
    again = make(root)
    assert [path.stat().st_mtime_ns for path in prepared] == times
    assert sorted((root / "cache").rglob("*.*")) == prepared
    assert all(np.array_equal(again._tokens[split], source._tokens[split]) for split in source.splits)
    decoded = json.loads(prepared[-1].read_text())["words"]
    assert [decoded[i] for i in source._tokens["train"]] == words


class Numbers(TokenStreams):
    """A corpus of the size of WikiText-103 without its memory: every token is word 0."""

    def load(self) -> Corpus:
        sizes = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
        tokens = {split: np.broadcast_to(np.int32(0), (size,)) for split, size in sizes.items()}
        return Corpus(tokens, [3, 1], {})


def test_the_published_numbers_of_segments():
    source = Numbers(streams=56, eval_streams=16, segment=150)
    assert source.steps(0) == source.steps(7) == 12_289
    ((tokens, targets),) = next(source.train(epoch=0, start=12_288, shard=Shard()))
    assert tokens.shape == targets.shape == (56, 138)
    for split, segments, predicted in (("valid", 91, 217_616), ("test", 103, 245_552)):
        sizes = [targets.numel() for _, targets in source.evaluate(split, shard=Shard())]
        assert (len(sizes), sum(sizes)) == (segments, predicted)


class Counting(TokenStreams):
    """103 training and 41 validation tokens, each its own position."""

    def load(self) -> Corpus:
        tokens = {"train": np.arange(103, dtype=np.int32), "valid": np.arange(41, dtype=np.int32)}
        return Corpus(tokens, [1] * 103, {})


def test_streams_are_contiguous_and_segments_follow_each_other():
    source = Counting(streams=4, eval_streams=3, segment=7)
    steps = [batch for (batch,) in source.train(epoch=0, start=0, shard=Shard())]
    assert [tokens.shape[1] for tokens, _ in steps] == [7, 7, 7, 3] and len(steps) == source.steps(0)
    tokens, targets = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
    # 103 // 4 = 25 tokens a stream, the last of which is only a target
    assert torch.equal(tokens, torch.arange(4)[:, None] * 25 + torch.arange(24))
    assert torch.equal(targets, tokens + 1)
    assert tokens.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 1), (3, 2), (4, 5)])
def test_any_number_of_processes_sees_the_same_streams(world, micro):
    source = Counting(streams=4, eval_streams=3, segment=7)
    shards = [Shard(rank=rank, world=world, micro=micro) for rank in range(world)]
    for whole, *parts in zip(
        source.train(epoch=1, start=1, shard=Shard()),
        *(source.train(epoch=1, start=1, shard=shard) for shard in shards),
        strict=True,
    ):
        pieces = [batch for part in parts for batch in part]
        assert len({len(part) for part in parts}) == 1
        for ours, expected in zip(zip(*pieces, strict=True), whole[0], strict=True):
            assert torch.equal(torch.cat(ours), expected)
    whole = [targets for _, targets in source.evaluate("valid", shard=Shard())]
    shared = [[targets for _, targets in source.evaluate("valid", shard=shard)] for shard in shards]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in shared if part]), expected)


def test_training_resumes_in_the_middle_of_an_epoch():
    source = Counting(streams=4, eval_streams=3, segment=7)
    whole = list(source.train(epoch=2, start=0, shard=Shard()))
    rest = list(source.train(epoch=2, start=2, shard=Shard()))
    assert all(torch.equal(a, b) for x, y in zip(whole[2:], rest, strict=True) for a, b in zip(x[0], y[0], strict=True))


def test_too_many_processes():
    source = Counting(streams=4, eval_streams=3, segment=7)
    with pytest.raises(DataError, match="5 processes cannot share streams=4"):
        next(source.train(epoch=0, start=0, shard=Shard(rank=0, world=5)))


def test_unigram_perplexity(root):
    counts, targets = [5, 2, 0], np.array([[0, 1], [2, 0]])
    p = [6 / 10, 3 / 10, 1 / 10]
    expected = math.exp(-sum(math.log(p[i]) for i in (0, 1, 2, 0)) / 4)
    assert unigram_perplexity(counts, targets) == pytest.approx(expected, rel=1e-12)
    source = make(root)
    predicted = torch.cat([targets.flatten() for _, targets in source.evaluate("valid", shard=Shard())])
    train = torch.bincount(
        torch.from_numpy(np.array(source._tokens["train"])), minlength=source.spec.inputs["vocab_size"]
    )
    log_p = torch.log((train + 1) / (train + 1).sum().double())
    assert source.spec.baseline["valid"] == pytest.approx(torch.exp(-log_p[predicted].mean()).item(), rel=1e-9)


def test_missing_files_and_splits(root):
    with pytest.raises(DataError, match=r"wiki\.test\.tokens missing.*data\.root=.*data\.download=true"):
        make(root, files=FILES | {"test": "wiki.test.tokens"})
    assert make(root, files=FILES | {"test": None}).splits == ("train", "valid")
    wrong = ({"valid": "wiki.valid.tokens"}, FILES | {"dev": "wiki.valid.tokens"})
    for files in (*wrong, FILES | {"train": ["a.txt", "b.txt"]}, FILES | {"valid": 3}, "wiki.train.tokens"):
        with pytest.raises(ValueError, match="must name a file for train"):
            make(root, files=files)


def test_a_folder_of_texts(root):
    (root / "texts").mkdir()
    with pytest.raises(DataError, match="texts is a folder, and a split is one file: join its files"):
        make(root, files=FILES | {"train": "texts"})


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("\n \n", "no words")])
def test_an_empty_file(root, text, message):
    write(root, train=text)
    with pytest.raises(DataError, match=rf"wiki\.train\.tokens.*{message}"):
        make(root)


def test_an_unknown_word(root):
    write(root, valid=VALID + "the zebra sat\n")
    with pytest.raises(DataError, match=r"wiki\.valid\.tokens, line 17: the word 'zebra' .*data\.oov=unk"):
        make(root)
    source = make(root, oov="unk")
    unk = Vocabulary.from_lines((line.split() for line in TRAIN.splitlines()), "").index["<unk>"]
    assert source._tokens["valid"][-3] == unk
    with pytest.raises(DataError, match="line 17"):  # what was prepared for one rule is not taken for the other
        make(root)
    with pytest.raises(ValueError, match="error, unk"):
        make(root, oov="skip")


def test_a_text_without_unk_gets_one_for_the_unknown_words(root):
    """Its vocabulary as kept on disk stays that of the text, which serves both rules."""
    write(root, train="a b c\n" * 20, valid="a d\n" * 20)
    for _ in range(2):  # the second time from what was prepared
        source = make(root, oov="unk")
        assert source.spec.inputs == {"vocab_size": 5} and source._tokens["valid"][:3].tolist() == [1, 4, 0]
        assert math.isfinite(source.spec.baseline["valid"])
    write(root, train="a b c\n" * 20, valid="a b\n" * 20)
    assert make(root).spec.inputs == {"vocab_size": 4}


def test_byte_order_marks_are_no_letters(root):
    """Neither at the beginning nor where files were joined; a text with them is the text without them."""
    plain = make(root)
    marked = write(root.parent / "marked")
    for name in FILES.values():
        text = (marked / name).read_text(encoding="utf-8")
        (marked / name).write_text(text, encoding="utf-8-sig")
    found = make(marked)
    for split in FILES:
        assert np.array_equal(found._tokens[split], plain._tokens[split])
    assert found.digests() == plain.digests() and found.spec.inputs == plain.spec.inputs
    joined = root.parent / "joined"
    joined.write_bytes(2 * "the cat\n".encode("utf-8-sig"))
    assert list(read_words(joined)) == [["the", "cat"], ["the", "cat"]]
    joined.write_text(" the \ufeff \ufeffcat \n", encoding="utf-8")
    assert list(read_words(joined)) == [["the", "\ufeff", "\ufeffcat"]], (
        "inside a line the counts are the published ones"
    )


def test_bytes_that_are_not_utf8(root):
    (root / "wiki.valid.tokens").write_bytes(b"the cat\nthe \xff cat\n")
    with pytest.raises(
        DataError, match=r"wiki\.valid\.tokens is not UTF-8 text: line 2 has the byte 0xff at position 5"
    ):
        make(root)


def test_a_vocabulary_of_another_corpus_or_damaged(root, tmp_path):
    make(root)
    other = write(tmp_path / "other", train="x " + TRAIN)
    make(other)
    (ours,), (theirs,) = (list((folder / "cache").rglob("vocabulary.json")) for folder in (root, other))
    text = ours.read_text()
    ours.write_text(theirs.read_text())
    with pytest.raises(DataError, match=r"vocabulary\.json is the vocabulary of another corpus.*data\.cache"):
        make(root)
    for damaged in (text[: len(text) // 2], "[]", text.replace('"the"', '"cat"'), '{"format": 1}'):
        ours.write_text(damaged)
        with pytest.raises(DataError, match=r"damaged.*delete it"):
            make(root)
    ours.unlink()
    make(root)
    assert ours.read_text() == text


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["empty", "half of it zero"])
def test_damaged_indices_are_made_again(root, kept, caplog):
    tokens = {split: np.array(found) for split, found in make(root)._tokens.items()}
    for path in (root / "cache").rglob("*.npy"):
        content = path.read_bytes()
        size = int(kept * len(content))
        path.write_bytes(content[:size] + bytes(len(content) - size if size else 0))
    found = make(root)._tokens
    assert caplog.text.count("is damaged, or of an earlier version: it is made again") == 2
    assert all(np.array_equal(found[split], tokens[split]) for split in tokens)
    caplog.clear()
    make(root)
    assert "damaged" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 100}, r"segment=100 is longer than a stream of the split 'train': .* streams=4"),
        ({"eval_streams": 60}, r"split 'train': .* eval_streams=60"),
        ({"segment": 26}, r"segment=26 .* split 'valid'.* eval_streams=3"),
    ],
)
def test_a_segment_longer_than_a_stream(root, options, message):
    with pytest.raises(DataError, match=message):
        make(root, **options)


@pytest.mark.parametrize("name", ["streams", "eval_streams", "segment"])
def test_counts_must_be_positive_integers(root, name):
    for value in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            make(root, **{name: value})


def test_the_published_counts_are_checked(root):
    with pytest.raises(DataError, match=r"words instead of 267735; train has \d+ tokens instead of 103227021"):
        make(root, allow_partial=False)


def test_download_writes_the_lines_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        lines = (TRAIN if split == "train" else VALID).split("\n")[:-1]
        return [{"text": line + "\n" if line.strip() else ""} for line in lines]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    root = tmp_path / "new"
    make(root, download=True)
    assert asked == [("Salesforce/wikitext", "wikitext-103-v1", split) for split in ("train", "validation")]
    assert [(root / name).read_text() for name in FILES.values()] == [TRAIN, VALID]
    asked.clear()
    make(root, download=True)
    assert asked == []

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DataError, match=r"could not be downloaded .*no route.*wiki\.\*\.tokens"):
        make(tmp_path / "offline", download=True)


REAL = Path(os.environ.get("PHANTOM_DATA", "/nonexistent")) / "wikitext103"


@pytest.mark.skipif(
    not (REAL / "wiki.test.tokens").is_file(), reason="PHANTOM_DATA has no wikitext103/wiki.test.tokens"
)
def test_the_real_text_has_the_published_sizes(tmp_path):
    files = {"train": "wiki.test.tokens", "valid": "wiki.valid.tokens", "test": None}
    source = make(REAL, files=files, oov="unk", cache=str(tmp_path), streams=16, eval_streams=16, segment=150)
    assert source.spec.sizes == {"train": 245_569, "valid": 217_646}
    assert source.spec.inputs["vocab_size"] == 14_143


def test_a_rehearsal_evaluates_on_the_first_tokens(root):
    whole, cut = make(root), make(root, eval_tokens=21)
    assert cut.spec.sizes == {**whole.spec.sizes, "valid": 21}
    assert np.array_equal(cut._tokens["valid"], whole._tokens["valid"][:21])
    with pytest.raises(ValueError, match="eval_tokens=1 must be an integer >= 2, or null for all"):
        make(root, eval_tokens=1)


def test_a_config_saved_before_it_had_that_argument_is_the_same_run():
    saved = plan(["model=deq_transformer_small", "data=wikitext103"])
    config = yaml.safe_load(saved.text)
    assert config["data"].pop("eval_tokens", "absent") is None
    assert saved.differences(yaml.safe_dump(config)) == []


def test_an_end_of_line_in_the_text_counts():
    vocabulary = Vocabulary.from_lines([["a", "<eos>"], ["a"]], "x")
    assert vocabulary.words == ("<eos>", "a") and vocabulary.counts == (3, 2)
