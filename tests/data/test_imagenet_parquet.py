"""ImageNet from Parquet files: indexed or streamed, order and augmentation depend on (seed, epoch, index) alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data.images.parquet import through_buffer
from phantom.engine.errors import DataError
from phantom.engine.source import Shard
from tests.data.test_imagenet import epoch_of, make

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
COUNTS = {"train": (7, 6), "validation": (4,)}  # rows of every file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of two rows a group, in which the label of a row is its index modulo 3."""
    root = tmp_path_factory.mktemp("parquet")
    generator = np.random.default_rng(0)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["n01", "n02", "n03"])}
    for split, counts in COUNTS.items():
        first = 0
        for number, count in enumerate(counts):
            rows = [{"image": picture(generator), "label": (first + i) % 3} for i in range(count)]
            made = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
            made.to_parquet(str(root / f"{split}-{number:05d}-of-{len(counts):05d}.parquet"), batch_size=2)
            first += count
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def picture(generator) -> dict:
    file = io.BytesIO()
    size = (30 + generator.integers(20), 30 + generator.integers(20), 3)
    Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(file, "JPEG")
    return {"bytes": file.getvalue(), "path": None}


def equal(ours, theirs) -> bool:
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
def test_order_and_augmentation_do_not_depend_on_workers_start_or_shards(folder, streaming):
    def made(**changes):
        return make(folder, streaming=streaming, **changes)

    source = made()
    assert source.spec.sizes == {"train": 13, "test": 4} and source.spec.inputs["num_classes"] == 3
    whole = epoch_of(source)
    assert [len(batch[1]) for [batch] in whole] == [3, 3, 3, 3, 1]
    assert sorted(label for [batch] in whole for label in batch[1].tolist()) == sorted(i % 3 for i in range(13))
    assert equal(epoch_of(made(workers=2)), whole)
    for start in (1, 3, 4):
        assert equal(epoch_of(made(), start=start), whole[start:]), "a resumed run sees the rest of the epoch"
    ranks = [epoch_of(made(), shard=Shard(rank, 2)) for rank in range(2)]
    for step in range(4):
        assert torch.equal(torch.cat([rank[step][0][0] for rank in ranks]), whole[step][0][0])
    assert ranks[0][4] == ranks[1][4] == [], "one picture is too few for two processes"
    assert not torch.equal(epoch_of(source, epoch=1)[0][0][0], whole[0][0][0])
    assert equal(epoch_of(source), whole), "a second pass is the first one"


def test_a_stream_augments_a_picture_as_an_index_does(folder):
    """Both have the same pictures, whatever their order."""
    parts = []
    for streaming in (False, True):
        batches = [batch for [batch] in epoch_of(make(folder, streaming=streaming), epoch=2)]
        images = torch.cat([images for images, _ in batches]).flatten(1)
        parts.append(images[images[:, 0].argsort()])
    assert torch.equal(*parts)


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
def test_evaluation_sees_every_row_once_over_all_ranks(folder, streaming):
    source = make(folder, streaming=streaming)
    batches = [list(source.evaluate("test", shard=Shard(rank, 3))) for rank in range(3)]
    assert [[b[1].tolist() for b in rank] for rank in batches] == [[[0, 0]], [[1]], [[2]]]


def test_both_have_one_fingerprint_and_other_files_another(folder, tmp_path):
    indexed, streamed = make(folder), make(folder, streaming=True)
    assert indexed.digests() == streamed.digests()
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert make(tmp_path, streaming=True).digests() == indexed.digests(), "the same files elsewhere"
    (tmp_path / "train-00001-of-00002.parquet").write_bytes((folder / "train-00000-of-00002.parquet").read_bytes())
    other = make(tmp_path, streaming=True).digests()
    assert other["train"] != indexed.digests()["train"] and other["test"] == indexed.digests()["test"]


def test_a_subset_of_a_stream_is_its_first_rows(folder):
    source = make(folder, streaming=True, subset=5, test_subset=1)
    labels = [label for [batch] in epoch_of(source) for label in batch[1].tolist()]
    assert sorted(labels) == [0, 0, 1, 1, 2] and source.spec.sizes == {"train": 5, "test": 1}


@pytest.mark.parametrize(("count", "buffer"), [(50, 1), (50, 7), (50, 50), (3, 10), (0, 4)])
def test_a_buffer_sends_out_everything_once_and_nothing_too_early(count, buffer):
    indices = list(range(100, 100 + count))
    order = through_buffer(indices, buffer, "key")
    assert sorted(order) == indices and order == through_buffer(indices, buffer, "key")
    assert all(index - 100 < place + buffer for place, index in enumerate(order))
    if buffer == 1:
        assert order == indices
    elif count == 50:
        assert order != indices and order != through_buffer(indices, buffer, "another key")


def test_a_full_buffer_is_a_uniform_draw():
    """Of three pictures, each of the six orders comes as often: 600 draws, five standard deviations."""
    orders = [tuple(through_buffer([0, 1, 2], 3, str(i))) for i in range(600)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and all(abs(count - 100) < 5 * (600 * 5 / 36) ** 0.5 for count in counts)


def test_a_name_and_a_folder_are_the_same_root(folder):
    assert equal(epoch_of(make(f"hf:{folder}", streaming=True)), epoch_of(make(folder, streaming=True)))


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
def test_what_is_missing_or_damaged_is_named(folder, tmp_path, streaming):
    with pytest.raises(DataError, match=r"could not be read by Hugging Face .*name a folder"):
        make(f"hf:{tmp_path / 'nowhere'}", streaming=streaming)
    rows = [{"image": {"bytes": b"no picture", "path": "a.JPEG"}, "label": 0}]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["n01"])})
    made = datasets.Dataset.from_list(rows, features=kinds)
    made.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    with pytest.raises(DataError, match=r"has no Parquet files of the split validation; it has train. Expected"):
        make(tmp_path, streaming=streaming)
    made.to_parquet(str(tmp_path / "validation-00000-of-00001.parquet"))
    with pytest.raises(DataError, match=r"the picture a.JPEG \(row 0 of train in .*\) is damaged"):
        epoch_of(make(tmp_path, streaming=streaming))
    words = datasets.Dataset.from_list([{"image": "a.JPEG", "label": 0}])
    words.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    with pytest.raises(DataError, match=r"expected a picture `image` .* and a class `label`"):
        make(tmp_path, streaming=streaming)


@pytest.mark.parametrize("told", [True, False], ids=["statistics", "no statistics"])
@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, r"label -1, which must be in 0\.\.2 .*: leave the row out"),
        ({"label": None}, "label None"),
        ({"label": 3}, "label 3"),
        ({"image": None}, "no bytes: leave the row out"),
        ({"image": {"bytes": None, "path": "a.JPEG"}}, "no bytes"),
    ],
    ids=["hidden", "no label", "unknown", "no picture", "a path alone"],
)
def test_a_row_without_a_picture_or_a_class_is_named(folder, tmp_path, change, message, streaming, told):
    """Before the first step, where the file has statistics: the epoch before an evaluation can last for hours."""
    generator = np.random.default_rng(0)
    rows = [{"image": picture(generator), "label": i % 3} for i in range(5)]
    rows[3] |= change
    first = folder / "train-00000-of-00002.parquet"
    table = pyarrow.Table.from_pylist(rows, schema=pq.read_schema(first))
    pq.write_table(table, tmp_path / "validation-00000-of-00001.parquet", row_group_size=2, write_statistics=told)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(first.read_bytes())
    with pytest.raises(DataError, match=rf"^the picture .*\(row 3 of validation in .*\) has (the )?{message}"):
        source = make(tmp_path, streaming=streaming)
        assert not told
        list(source.evaluate("test", shard=Shard()))


def test_a_tree_is_no_stream(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "n01").mkdir(parents=True)
    with pytest.raises(DataError, match=r"data.streaming=true reads Parquet files.*leave it out"):
        make(tmp_path, streaming=True)
