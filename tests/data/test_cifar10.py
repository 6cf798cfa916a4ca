"""CIFAR-10 from both layouts, and one clear error for each way it can be wrong."""

import hashlib
import logging
import os
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from data.images import cifar10
from data.images.cifar10 import CIFAR10, CLASSES
from phantom.engine.errors import DataError
from phantom.engine.source import Shard

SETTINGS = dict(
    download=False,
    allow_partial=True,
    batch_size=4,
    eval_batch_size=100,
    augment="none",
    validation=0,
    subset=None,
    test_subset=None,
    seed=0,
)


def make(root, **changes):
    return CIFAR10(**(SETTINGS | {"root": None if root is None else str(root)} | changes))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PHANTOM_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path):
    """A tree of two training pictures and one test picture per class; the red channel tells the class."""
    root = tmp_path / "tree"
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((32, 32, 3), (label * 20, i, 7), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


@pytest.fixture
def canonical(tmp_path, monkeypatch):
    """The release's own files, ten images a batch; the checksums torchvision asks for are those of these files."""
    folder = tmp_path / "canonical" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    sums = {}
    for n, name in enumerate([*names, "batches.meta"]):
        if name == "batches.meta":
            content = {"label_names": list(CLASSES)}
        else:
            data = np.arange(10 * 3072, dtype=np.int64).reshape(10, 3072) % 251 + n
            content = {"data": (data % 256).astype(np.uint8), "labels": list(range(10))}
        blob = pickle.dumps(content)
        (folder / name).write_bytes(blob)
        sums[name] = hashlib.md5(blob).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, sums[n]] for n in names[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return folder.parent


def test_a_folder_tree_gives_the_pictures_and_labels(tree, caplog):
    with caplog.at_level("INFO"):
        source = make(tree)
    assert "image-folder tree" in caplog.text and "20 train images" in caplog.text
    [(images, labels)] = source.evaluate("test", shard=Shard())
    red = images[:, 0, 0, 0] * 0.2023 + 0.4914
    assert labels.tolist() == list(range(10))
    assert torch.allclose(red, torch.arange(10) * 20 / 255, atol=1e-6)
    assert source.spec.inputs == {"in_channels": 3, "num_classes": 10}


def test_pixels_coded_anew_are_told_from_the_release(tree, caplog, monkeypatch):
    released = make(tree).spec.digests
    assert "not the images as released" in caplog.text  # twenty pictures are not
    monkeypatch.setattr(cifar10, "DIGESTS", released)
    caplog.clear()
    make(tree)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for path in (tree / "test").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    make(tree)
    assert "not the images as released" in caplog.text


def test_decoded_pictures_are_kept_until_the_tree_changes(tree, cache):
    make(tree)
    kept = sorted(cache.rglob("*.npy"))
    assert len(kept) == 2
    make(tree)
    assert sorted(cache.rglob("*.npy")) == kept
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tree / "test" / "cat" / "0000.png")
    [(images, _)] = make(tree).evaluate("test", shard=Shard())
    assert images[3, 0, 0, 0] == pytest.approx((1 - 0.4914) / 0.2023, abs=1e-5)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:200], lambda content: b"garbage"])
def test_damaged_copies_are_decoded_again(tree, cache, damage):
    before = make(tree).spec.digests
    kept = {path: path.read_bytes() for path in cache.rglob("*.npy")}
    for path, content in kept.items():
        path.write_bytes(damage(content))
    assert make(tree).spec.digests == before
    assert {path: path.read_bytes() for path in cache.rglob("*.npy")} == kept


def test_a_file_name_that_is_not_utf8(tree):
    before = make(tree).spec.digests
    folder = os.fsencode(tree / "train" / "cat")
    os.rename(folder + b"/0001.png", folder + b"/caf\xe9.png")
    assert make(tree).spec.digests == before


def test_canonical_files_are_read_by_torchvision(canonical, caplog):
    with caplog.at_level("INFO"):
        source = make(canonical)
    assert "canonical files" in caplog.text
    assert source.spec.sizes == {"train": 50, "test": 10}
    [(images, _)] = source.evaluate("test", shard=Shard())
    # the files hold channel planes, row by row
    expected = (torch.arange(3072) % 251 + 5).view(3, 32, 32)
    got = images[0] * torch.tensor((0.2023, 0.1994, 0.2010)).view(3, 1, 1) + torch.tensor(
        (0.4914, 0.4822, 0.4465)
    ).view(3, 1, 1)
    assert torch.allclose(got * 255, expected.float(), atol=1e-3)


def test_the_environment_names_the_parent(tree, monkeypatch, tmp_path):
    (tmp_path / "all").mkdir()
    tree.rename(tmp_path / "all" / "cifar10")
    monkeypatch.setenv("PHANTOM_DATA", str(tmp_path / "all"))
    assert make(None).spec.sizes["train"] == 20


def test_a_missing_root_names_the_path_and_both_layouts(tmp_path):
    with pytest.raises(DataError) as error:
        make(tmp_path / "nowhere")
    for word in ("nowhere", "does not exist", "cifar-10-batches-py", "train/<class>", "data.root", "download"):
        assert word in str(error.value)


def test_counts_other_than_the_release_are_an_error_unless_allowed(tree):
    with pytest.raises(DataError, match=r"20 train images, expected 50000.*allow_partial"):
        make(tree, allow_partial=False)


def test_a_truncated_picture_is_named(tree):
    path = tree / "train" / "dog" / "0001.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"dog/0001.png is damaged"):
        make(tree)


def test_a_picture_of_another_size_is_named(tree):
    Image.new("RGB", (16, 32)).save(tree / "train" / "dog" / "0001.png")
    with pytest.raises(DataError, match=r"0001.png is 16 x 32 pixels, expected 32 x 32"):
        make(tree)


def test_wrong_class_folders_are_named(tree):
    (tree / "train" / "dog").rename(tree / "train" / "wolf")
    with pytest.raises(DataError, match=r"one folder for each of airplane.*wolf"):
        make(tree)


def test_an_empty_class_folder_is_named(tree):
    (tree / "test" / "ship" / "0000.png").unlink()
    with pytest.raises(DataError, match="ship holds no picture"):
        make(tree)


@pytest.mark.parametrize("there", [False, True])
def test_a_download_without_a_network_says_so(tmp_path, monkeypatch, there):
    """Also where some of the files are there already."""

    def offline(*_, **__):
        raise URLError(OSError("Name or service not known"))

    monkeypatch.setattr("urllib.request.urlopen", offline)
    if there:
        (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=rf"could not be downloaded to {tmp_path} \(.*not known.*\): connect") as error:
        make(tmp_path, download=True)
    assert "as released" not in str(error.value) and "data.root=<folder>" in str(error.value)


def test_a_damaged_canonical_file_is_one_error(canonical):
    (canonical / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(DataError, match="not CIFAR-10 as released"):
        make(canonical)
