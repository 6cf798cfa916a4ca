"""Rounds of beginnings: from other weights, from the end of another run, with another number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from phantom.engine.artifacts import checkpoint
from scripts.drilling.room import Room, contents, differences, hold, whole
from scripts.drilling.rounds import drill

# without a decay of the rate, one budget is the beginning of a longer one
STEADY = (
    *("subset=24", "test_subset=20", "data.batch_size=8", "data.eval_batch_size=7", "ema=0.9"),
    *("steps=null", "eval_every=null", "log_every=1", "checkpoint_every=5", "schedule=constant"),
)
# what makes a training independent of the number of its ranks, but for rounding; slow, so that rounding stays small
SHARED = (
    *("sync_batchnorm=true", "model.dropout=0", "optimizer.lr=1e-4", "optimizer.eps=0.01"),
    "keep_checkpoints=20",
)
# of the way of five steps: in single precision a ReLU that flips costs some hundredths, and in the end much more
AWAY = 0.05


def _hold_same(folder: Path, other: Path) -> None:
    found = differences(folder, other)
    hold(not found, f"the run differs from the unbroken one in {', '.join(found)}")


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the Euclidean distance of two models' weights; the statistics of a batch norm are none."""
    names = [name for name in a if "running" not in name and "num_batches" not in name]
    return sum(float((a[name] - b[name]).square().sum()) for name in names) ** 0.5


def _models(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    states = [checkpoint.load(path) for path in folder.glob("last*.pt")]
    return {state["step"]: state["model"] for state in states}


def _other_number(room: Room, before: int, after: int) -> None:
    with Room() as alone:
        alone.finish(*SHARED)
        expected = _models(alone.run)
    room.kill(*SHARED, rows=3, ranks=before)
    stopped = max(_models(room.run))
    hold(stopped <= max(expected) / 2, f"it was killed at step {stopped}")
    room.finish(*SHARED, ranks=after)
    found = _models(room.run)
    hold(max(found) == max(expected), f"it ends at step {max(found)}")
    next_one = stopped + 5
    away = _distance(found[next_one], expected[next_one])
    way = _distance(found[next_one], found[stopped])
    hold(away <= AWAY * way, f"at step {next_one} the weights are {away:.1e} away, of a way of {way:.1e}")


@drill("two-ranks-to-one")
def two_to_one(room: Room) -> None:
    """Two ranks killed, and one goes on: after five steps, the weights of one rank but for rounding; it ends."""
    _other_number(room, 2, 1)


@drill("one-rank-to-two")
def one_to_two(room: Room) -> None:
    """One rank killed, and two go on: the same."""
    _other_number(room, 1, 2)


@drill("init")
def init(room: Room) -> None:
    """init=<checkpoint> begins with exactly its weights, those of the moving average."""
    # the floor of the cosine is above a rate of zero
    still = ("optimizer.lr=0", "optimizer.weight_decay=0", "schedule=constant")
    start = whole(1) / "last.pt"
    room.finish(f"init={start}", *still)
    expected, found = checkpoint.load(start)["ema"], checkpoint.load(room.run / "last.pt")["model"]
    # the statistics of a batch norm follow the batches, whatever the rate
    names = [name for name in expected if "running" not in name and "num_batches" not in name]
    changed = [name for name in names if not torch.equal(found[name], expected[name])]
    hold(len(names) > 10 and not changed, f"other weights: {', '.join(changed)}")


@drill("init-killed")
def init_killed(room: Room) -> None:
    """A run with init=, killed, goes on bit for bit; it needs that file no more."""
    start = Path(shutil.copy(whole(1) / "best.pt", room.folder / "start.pt"))
    with Room() as alone:
        alone.finish(f"init={start}")
        room.kill(f"init={start}", rows=11)
        start.unlink()
        room.finish(f"init={start}")
        _hold_same(room.run, alone.run)


def _continued(room: Room, kill: bool) -> None:
    with Room() as first, Room() as alone:
        first.finish("epochs=10", data=STEADY)
        alone.finish("epochs=20", data=STEADY)
        before = contents(first.run)
        items = ("epochs=20", f"continue_from={first.run}")
        if kill:
            room.kill(*items, rows=before["metrics.jsonl"].count(b"\n") + 12, data=STEADY)
        room.finish(*items, data=STEADY)
        _hold_same(room.run, alone.run)
        hold(before == contents(first.run), "the first run was changed")


@drill("continued")
def continued(room: Room) -> None:
    """A finished epochs=10, continued to epochs=20 at a constant rate: 20 epochs, bit for bit; the first run stays."""
    _continued(room, kill=False)


@drill("continued-killed")
def continued_killed(room: Room) -> None:
    """The same where the continued run is killed."""
    _continued(room, kill=True)


@drill("more-epochs")
def more_epochs(room: Room) -> None:
    """epochs=20 after a finished epochs=10, without continue_from, is a run of its own; the finished one stays."""
    room.finish("epochs=10", data=STEADY)
    first = room.run
    before = contents(first)
    job = room.finish("epochs=20", data=STEADY)
    hold("this run is finished" not in job.text and before == contents(first), job.text)
    with Room() as alone:
        alone.finish("epochs=20", data=STEADY)
        (other,) = (path.parent for path in room.runs.rglob("record.json") if path.parent != first)
        _hold_same(other, alone.run)


@drill("continued-short")
def continued_short(room: Room) -> None:
    """continue_from with a budget that is spent already is refused in one sentence, before any work."""
    start = whole(1)
    before = contents(start)
    room.start(f"continue_from={start}").hold_refused("ends before it begins")
    hold(before == contents(start) and not list(room.runs.rglob("last.pt")), "something was written")
