"""A run whose folder is moved, removed or taken over under it ends with a sentence, and writes nothing more there."""

import shutil
from pathlib import Path

import pytest

from phantom.engine.artifacts import checkpoint
from phantom.engine.errors import LockedError
from tests.engine import tiny


class Disturbed(tiny.Vectors):
    """Vectors that call `disturb` before global training step 4, in the second epoch."""

    def __init__(self, disturb) -> None:
        super().__init__()
        self.disturb = disturb

    def train(self, *, epoch, start, shard):
        for i, batches in enumerate(super().train(epoch=epoch, start=start, shard=shard), start):
            if epoch == 1 and i == 1:
                self.disturb()
            yield batches


def end(folder: Path, disturb) -> None:
    with pytest.raises(LockedError, match=r"metrics\.jsonl is no longer the file that this run writes: "):
        tiny.trainer(folder, source=Disturbed(disturb)).fit(resume=True)


def test_a_folder_that_is_moved_is_not_made_again(tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    end(folder, lambda: folder.rename(elsewhere))
    assert not folder.exists() and checkpoint.load(elsewhere / "last.pt")["step"] == 3
    elsewhere.rename(folder)
    tiny.trainer(folder).fit(resume=True)
    tiny.trainer(tmp_path / "whole").fit(resume=True)
    assert tiny.rows(folder) == tiny.rows(tmp_path / "whole")


def test_a_folder_that_is_removed_stays_removed(tmp_path):
    folder = tmp_path / "run"
    end(folder, lambda: shutil.rmtree(folder))
    assert not folder.exists()


def test_rows_that_are_removed_are_missed(tmp_path):
    end(tmp_path, (tmp_path / "metrics.jsonl").unlink)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3


def test_another_run_in_the_same_place_is_left_alone(tmp_path):
    """The lock goes with the folder that it is in, and does not keep the second run away."""
    folder = tmp_path / "run"

    def take_over():
        shutil.rmtree(folder)
        tiny.trainer(folder, budget=tiny.budget(epochs=1)).fit(resume=True)

    end(folder, take_over)
    assert checkpoint.load(folder / "last.pt")["step"] == 3
    assert {row["step"] for row in tiny.rows(folder)} == {1, 2, 3}


def test_a_checkpoint_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "gone" / "last.pt", {"step": 1})
    assert not (tmp_path / "gone").exists()
