"""A process of torch's DataLoader that dies is a sentence; an exception inside of it keeps its own text and place."""

import os
import signal

import pytest
from torch.utils.data import DataLoader

from phantom.engine.errors import DataError
from tests.engine import tiny


class Failing:
    """A data set of the user's, whose example 4 is `fail`."""

    def __init__(self, fail) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index):
        if index == 4:
            self.fail()
        return tiny.randn(3, seed=index), index % 3


class Loaded(tiny.Vectors):
    def __init__(self, fail) -> None:
        super().__init__()
        self.fail = fail

    def train(self, *, epoch, start, shard):
        for batch in DataLoader(Failing(self.fail), batch_size=4, num_workers=1):
            yield [batch]


def refuse():
    raise RuntimeError("example 4 has no label")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_exception_of_the_data_set_is_shown_with_its_place(tmp_path):
    with pytest.raises(RuntimeError, match="example 4 has no label") as error:
        tiny.trainer(tmp_path, source=Loaded(refuse)).fit(resume=False)
    assert not isinstance(error.value, DataError) and "in refuse" in str(error.value)


def test_a_process_that_dies_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"a process that loads data died before step \d \(DataLoader worker \(pid"):
        tiny.trainer(tmp_path, source=Loaded(die)).fit(resume=False)
