"""A run belongs to its data: other data under the same name neither resume it nor pass as finished."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.digests import digest_of_files, fingerprint_of_tree
from phantom.engine.artifacts import checkpoint
from phantom.engine.errors import CheckpointError
from tests.tiny_run import tiny_run

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR = ("data=cifar10", "data.allow_partial=true", "data.augment=none", "subset=null", "test_subset=null", "steps=2")


def pictures(root: Path, seed: int) -> str:
    """Write two pictures of every class in the layout of an image folder; return how to name it."""
    draws = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "0.png")
    return f"data.root={root}"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    base = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        yield {name: pictures(base / name, seed) for name, seed in (("c1", 0), ("c2", 1), ("c1 moved", 0))}


def test_other_data_is_neither_finished_nor_resumed(tmp_path, sets):
    record = tiny_run(tmp_path, *CIFAR, sets["c1"])
    assert set(record["data_digests"]) == {"train", "test"}
    config = (record["path"] / "config.yaml").read_bytes()
    for part in ("record.json", "last.pt"):
        with pytest.raises(CheckpointError) as refused:
            tiny_run(tmp_path, *CIFAR, sets["c2"])
        text = str(refused.value)
        assert str(record["path"] / part) in text and "\n" not in text
        for known in (sets["c1"], sets["c2"]):
            assert known.removeprefix("data.root=") in text
        assert record["data_digests"]["train"] in text and "runs=<folder>" in text and "resume=never" in text
        before = (record["path"] / "last.pt").read_bytes()
        (record["path"] / "record.json").unlink(missing_ok=True)
    assert (record["path"] / "last.pt").read_bytes() == before
    assert (record["path"] / "config.yaml").read_bytes() == config, "which names the data of that run"
    other = tiny_run(tmp_path, *CIFAR, sets["c2"], "resume=never")
    assert other["path"] == record["path"] and other["data_digests"] != record["data_digests"]


def test_data_that_only_moved_are_the_same(tmp_path, sets):
    record = tiny_run(tmp_path, *CIFAR, sets["c1"])
    assert checkpoint.load(record["path"] / "last.pt")["data_digests"] == record["data_digests"]
    again = tiny_run(tmp_path, *CIFAR, sets["c1 moved"])
    assert again["finished"] == record["finished"] and again["data_digests"] == record["data_digests"]


def test_a_checkpoint_from_before_hashes_resumes(tmp_path, sets):
    record = tiny_run(tmp_path, *CIFAR, sets["c1"])
    (record["path"] / "record.json").unlink()
    state = torch.load(record["path"] / "last.pt", weights_only=True)
    del state["data_digests"]
    checkpoint.save(record["path"] / "last.pt", state)
    assert tiny_run(tmp_path, *CIFAR, sets["c2"])["final"] == record["final"]


@pytest.mark.parametrize("change", ["name", "size", "more"])
def test_a_tree_is_known_by_its_names_and_sizes(tmp_path, change):
    def tree(root: Path) -> str:
        (root / "a").mkdir(parents=True)
        files = [root / "a" / name for name in ("0.jpg", "\u00fc 1.jpg")]
        for file in files:
            file.write_bytes(b"12")
        return fingerprint_of_tree(root, reversed(files))

    found = tree(tmp_path / "one")
    assert found == tree(tmp_path / "two")
    file = tmp_path / "two" / "a" / "0.jpg"
    if change == "name":
        file.rename(file.with_name("2.jpg"))
    else:
        (file if change == "size" else file.with_name("2.jpg")).write_bytes(b"123")
    assert fingerprint_of_tree(tmp_path / "two", (tmp_path / "two" / "a").iterdir()) != found


def test_files_are_known_by_their_content(tmp_path):
    for folder, content in (("one", b"1"), ("two", b"1"), ("three", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_bytes(content)
    one, two, three = (digest_of_files((tmp_path / name).iterdir()) for name in ("one", "two", "three"))
    assert one == two != three
