"""What some ranks carried is what any other number of them goes on with, row by row."""

from pathlib import Path

import pytest
import torch

from phantom.engine.errors import CheckpointError
from phantom.engine.source import Shard
from phantom.engine.training.redistribution import carries_of, carries_to_resume

ROWS = 11


def carried(world: int, micro: int, rows: int = ROWS) -> list[list]:
    """Return a carry of nested tensors that hold the number of their row, as every rank keeps it per micro-batch."""
    whole = torch.arange(rows)
    found = []
    for rank in range(world):
        parts = Shard(rank, world, micro).parts(rows)
        own = [whole[part.start : part.stop] for part in parts]
        cut = [{"state": (piece[:, None].expand(-1, 3), piece), "steps": piece.clone()} for piece in own]
        found.append([*cut, *[None] * (micro - len(cut))])
    return found


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_every_row_goes_on_where_it_belongs(before, after, micro):
    expected = carried(after, micro)
    for rank in range(after):
        found = carries_of(carried(before, micro), Shard(rank, after, micro))
        assert len(found) == micro
        for own, wanted in zip(found, expected[rank], strict=True):
            if wanted is None:
                assert own is None
                continue
            assert own.keys() == wanted.keys() and isinstance(own["state"], tuple)
            for a, b in ((own["state"][0], wanted["state"][0]), (own["state"][1], wanted["state"][1])):
                assert torch.equal(a, b)
            assert torch.equal(own["steps"], wanted["steps"])


def test_nothing_carried_is_nothing():
    assert carries_of([[None, None], [None, None]], Shard(2, 3, 2)) == [None, None]


@pytest.mark.parametrize("world", [1, 3])
def test_carries_that_are_no_shares_are_refused(world):
    entries = [{"carries": [torch.zeros(5, 2)]}, {"carries": [torch.zeros(1, 2)]}]
    with pytest.raises(CheckpointError, match=rf"this run has {world}, .*not the shares.* resume with 2"):
        carries_to_resume(entries, Shard(0, world), by_rows=True, path=Path("last.pt"))
    with pytest.raises(CheckpointError, match=r"Task\.carry_rows"):
        carries_to_resume(entries, Shard(0, world), by_rows=False, path=Path("last.pt"))
    assert carries_to_resume(entries, Shard(1, 2), by_rows=False, path=Path("last.pt")) == entries[1]["carries"]
