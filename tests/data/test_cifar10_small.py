"""The small set is a fixed part of CIFAR-10, the same from every layout, each pixel the mean of a square."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.images.cifar10 import CLASSES
from data.images.cifar10_small import CIFAR10Small, shrink
from phantom.engine.errors import DataError
from phantom.engine.source import Shard
from tests.plans import composed

SETTINGS = dict(
    **dict(download=False, allow_partial=True, size=16, num_train=20, num_test=10, batch_size=4, eval_batch_size=100),
    **dict(augment="none", validation=0, subset=None, test_subset=None, seed=0),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tree(root: Path, names) -> Path:
    """Write four training pictures and two test pictures a class, whose file names `names` gives."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{names(i)}.png")
    return root


def images(source: CIFAR10Small, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images of a split in bytes, and their labels."""
    parts = list(source.evaluate(split, shard=Shard()))
    scale = torch.tensor([source.mean, source.std])[:, None, :, None, None]
    values = torch.cat([part for part, _ in parts]) * scale[1] + scale[0]
    return (values * 255).round(), torch.cat([labels for _, labels in parts])


def test_a_pixel_is_the_mean_of_its_square():
    pictures = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
    for size in (16, 8, 32):
        side = 32 // size
        squares = pictures.numpy().reshape(3, 3, size, side, size, side).astype(float).mean(axis=(3, 5))
        found = shrink(pictures, size)
        assert found.dtype == torch.uint8 and found.shape == (3, 3, size, size)
        assert np.abs(found.numpy() - squares).max() <= 0.5


def test_as_many_of_every_class_and_the_same_from_every_order_of_the_files(tmp_path):
    one = CIFAR10Small(root=str(tree(tmp_path / "a", lambda i: i)), **SETTINGS)
    other = CIFAR10Small(root=str(tree(tmp_path / "b", lambda i: 9 - i)), **SETTINGS)
    assert one.spec.sizes == {"train": 20, "test": 10} and one.spec.digests == other.spec.digests
    for split in ("train", "test"):
        (pixels, labels), (again, same) = images(one, split), images(other, split)
        assert torch.equal(pixels, again) and torch.equal(labels, same)
        assert pixels.shape[1:] == (3, 16, 16)
        assert labels.bincount().tolist() == [2 if split == "train" else 1] * 10


def test_a_larger_set_holds_a_smaller_one(tmp_path):
    root = str(tree(tmp_path / "a", lambda i: i))
    few, all_ = (images(CIFAR10Small(root=root, **SETTINGS | {"num_train": n}), "train")[0] for n in (10, 40))
    assert all(any(torch.equal(image, other) for other in all_) for image in few)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 15}, "size=15 must divide 32, as 16 or 8"),
        ({"num_train": 25}, "num_train=25 must be a multiple of 10"),
        ({"num_test": 0}, "num_test=0 must be an integer >= 10"),
    ],
)
def test_impossible_sizes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10Small(root=str(tmp_path), **SETTINGS | changes)


def test_a_missing_root_is_named_as_for_the_whole_set(tmp_path):
    with pytest.raises(DataError, match=r"no CIFAR-10 in .*which does not exist"):
        CIFAR10Small(root=str(tmp_path / "nowhere"), **SETTINGS)


def test_the_budget_of_scale_cpu():
    config, choices = composed(["experiment=table1/implicit", "scale=cpu", "data=cifar10_small"])
    paper, _ = composed(["experiment=table1/implicit"])
    assert {key for key in config if config[key] != paper[key]} == {"data", "epochs", "repeats", "scale"}
    assert (config["epochs"], config["repeats"], choices["data"]) == (8, 3, "cifar10_small")
    assert config["data"]["batch_size"] == 128, "the protocol of the row"


@pytest.mark.skipif("PHANTOM_DATA" not in os.environ, reason="needs $PHANTOM_DATA/cifar10")
def test_the_released_images_give_the_pinned_set():
    root = Path(os.environ["PHANTOM_DATA"]) / "cifar10"
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    sizes = {"num_train": 4000, "num_test": 2000, "allow_partial": False}
    source = CIFAR10Small(root=str(root), **SETTINGS | sizes)
    assert source.spec.digests == {"train": "458c202f46f38019", "test": "4761bfc376f9bdc2"}
