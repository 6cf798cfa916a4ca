"""A folder tree is read as its pictures, whatever else lies in it: links, hidden folders, what cannot be read."""

import os
from pathlib import Path

import pytest
from PIL import Image

from data.images.imagenet import ImageNet
from data.images.tree import SUFFIXES, list_classes, list_pictures
from phantom.engine.errors import DataError

COUNT = 3
OPTIONS = {
    **{"batch_size": 2, "eval_batch_size": 2, "crop": 8, "resize": 10, "scale": [0.1, 1], "ratio": [0.8, 1.25]},
    **{"workers": 0, "subset": None, "test_subset": None, "seed": 0, "streaming": False, "shuffle_buffer": 1},
}


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("n01", "n02")):
            (tmp_path / split / name / "more").mkdir(parents=True)
            for i in range(COUNT):
                place = tmp_path / split / name / ("more" if i == 1 else ".")
                Image.new("RGB", (12, 12), (80 * i, 80 * label, 0)).save(place / f"{i}.JPEG")
    return tmp_path


def samples(root: Path) -> dict[str, list[tuple[str, int]]]:
    source = ImageNet(root=str(root), **OPTIONS)
    return {split: source._sets[split].samples for split in ("train", "test")}


def test_the_order_is_that_of_torchvision(root):
    """Order and augmentation follow from a picture's index, so a run of before continues with the same pictures."""
    folder = pytest.importorskip("torchvision.datasets").ImageFolder
    (root / "train" / "n01" / "a b.png").write_bytes((root / "train" / "n01" / "0.JPEG").read_bytes())
    (root / "train" / "n01" / "notes.txt").touch()
    found = samples(root)
    for split, name in (("train", "train"), ("test", "val")):
        expected = folder(str(root / name))
        assert [(os.path.normpath(path), label) for path, label in found[split]] == [
            (os.path.normpath(path), label) for path, label in expected.samples
        ]
    assert folder(str(root / "train")).classes == list_classes(root / "train") == ["n01", "n02"]


def loop(root):
    (root / "train" / "again").symlink_to(".")


def up(root):
    (root / "train" / "up").symlink_to("..")


def up_inside(root):
    (root / "train" / "n01" / "up").symlink_to("../..")


def loop_inside(root):
    (root / "train" / "n02" / "more" / "loop").symlink_to("..")


def hidden(root):
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / ".ipynb_checkpoints" / "0.JPEG").touch()


def hidden_inside(root):
    (root / "val" / "n01" / ".thumbnails").mkdir()
    (root / "val" / "n01" / ".thumbnails" / "0.JPEG").touch()
    (root / "val" / "n01" / "._0.JPEG").touch()


@pytest.mark.parametrize("add", [loop, up, up_inside, loop_inside, hidden, hidden_inside])
def test_the_same_pictures_as_without(root, add):
    before = samples(root)
    add(root)
    assert samples(root) == before and len(before["train"]) == 2 * COUNT


def test_two_folders_that_link_to_each_other_end(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").touch()
        (tmp_path / name / "link").symlink_to(f"../{other}")
    assert list_pictures(tmp_path / "a", SUFFIXES) == [tmp_path / "a" / "a.png", tmp_path / "a" / "link" / "b.png"]


def test_a_class_may_be_a_link_to_elsewhere(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "n01"
    before = samples(root)
    (root / "train" / "n01").rename(elsewhere)
    (root / "train" / "n01").symlink_to(elsewhere)
    assert samples(root) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere"),
        (os.mkfifo, "is no file"),
        (lambda path: path.symlink_to(path.name), "is a link that leads nowhere"),
    ],
    ids=["dangling link", "pipe", "link to itself"],
)
def test_what_is_no_picture_is_a_sentence(root, make, message):
    make(root / "train" / "n01" / "9.JPEG")
    with pytest.raises(DataError, match=rf"the picture .*9\.JPEG {message}"):
        samples(root)


def test_a_folder_that_cannot_be_read_is_a_sentence(root, monkeypatch):
    """As permissions refuse it, which an administrator does not meet."""
    real = Path.iterdir

    def refuse(path):
        if path.name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"the folder .*more cannot be read \(Permission denied\)"):
        samples(root)


def test_an_empty_class_is_a_sentence(root):
    for split in ("train", "val"):
        (root / split / "n03").mkdir()
    with pytest.raises(DataError, match=r"no picture .* in the class folder .*n03"):
        samples(root)
