"""A run with a target stops at the first evaluation that is as good, and knows how long it trained until then."""

import json
from pathlib import Path

import pytest

from phantom.engine.artifacts import checkpoint
from phantom.engine.training import stopwatch
from tests.engine import tiny
from tests.engine.tiny import Killed
from tests.tiny_run import rows, tiny_run

STEP, EVALUATION, SAVE = 1.0, 100.0, 10_000.0  # seconds


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only entry is the time; nothing moves it but `Timed` and checkpoints."""
    now = [0.0]
    save = checkpoint.save
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now[0])

    def slow(path: Path, state) -> None:
        now[0] += SAVE
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", slow)
    return now


class Timed(tiny.Killing):
    """Steps take one second, and evaluations of a split a hundred."""

    def __init__(self, now: list[float], *, step: int | None = None, evaluation: int | None = None) -> None:
        super().__init__(step=step, evaluation=evaluation)
        self.now = now

    def train(self, *, epoch, start, shard):
        for batches in super().train(epoch=epoch, start=start, shard=shard):
            self.now[0] += STEP
            yield batches

    def evaluate(self, split, *, shard):
        self.now[0] += EVALUATION
        yield from super().evaluate(split, shard=shard)


def fit(folder: Path, source: tiny.Vectors, **budget):
    run = tiny.trainer(folder, source=source, budget=tiny.budget(**{"epochs": 9, "eval_every": 2, **budget}))
    run.fit(resume=True)
    return run


def accuracies(folder: Path) -> list[float]:
    return [row["accuracy"] for row in tiny.rows(folder) if row["kind"] == "eval" and row["split"] == "valid"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[float, int]:
    """Return a target, and the step of the first evaluation that reaches it, in the middle of a run without one."""
    folder = tmp_path_factory.mktemp("whole")
    assert fit(folder, tiny.Vectors()).reached is None
    found = accuracies(folder)
    target = sorted(set(found))[len(set(found)) // 2]
    first = next(i for i, value in enumerate(found) if value >= target)
    assert 0 < first < len(found) - 1 and all(value < target for value in found[:first])
    return target, 2 * (first + 1)


def test_it_stops_at_the_first_evaluation_that_is_as_good(tmp_path, whole, clock):
    target, step = whole
    run = fit(tmp_path, Timed(clock), target=target)
    assert run.reached and run.step == step and run.best["valid"]["step"] == step
    assert run.stopwatch.training == step * STEP
    assert run.stopwatch.total == clock[0] > step * STEP + step / 2 * (2 * EVALUATION + SAVE)
    before = (tmp_path / "last.pt").read_bytes()
    again = fit(tmp_path, Timed(clock, step=0), target=target)
    assert again.reached and again.step == step and (tmp_path / "last.pt").read_bytes() == before
    assert again.stopwatch.training == step * STEP, "a record that a kill prevented has the same seconds"


def test_a_target_that_is_not_reached_is_said(tmp_path):
    run = fit(tmp_path, tiny.Vectors(), target=100.1, epochs=1)
    assert run.reached is False and run.step == 3


def test_a_loss_is_good_where_it_is_low(tmp_path):
    def losses(**changes):
        run = tiny.trainer(tmp_path / str(len(changes)), task=tiny.WarmStart(), budget=tiny.budget(**changes))
        run.fit(resume=False)
        return run, [row["loss"] for row in tiny.rows(run.folder) if row.get("split") == "valid"]

    _, found = losses(eval_every=1)
    assert found[2] < min(found[:2])
    run, until = losses(eval_every=1, target=found[2])
    assert run.reached and until == found[:3]


@pytest.mark.parametrize("place", [{"step": 3}, {"evaluation": 1}, {"evaluation": 2}])
def test_the_seconds_before_a_kill_count(tmp_path, whole, clock, place):
    """Those up to the last checkpoint; the step after it is taken again, and was lost."""
    target, step = whole
    assert step > 2
    with pytest.raises(Killed):
        fit(tmp_path, Timed(clock, **place), target=target, checkpoint_every=1)
    run = fit(tmp_path, Timed(clock), target=target, checkpoint_every=1)
    assert run.step == step and run.stopwatch.training == step * STEP


def test_the_record_of_a_run_of_train(tmp_path):
    """Rehearsed on digits: reached, and out of reach; the clock has no evaluations."""
    record = tiny_run(tmp_path, "target=5", "steps=40", "eval_every=1")
    assert record["reached"] and record["target"] == 5 and record["steps"] < 40
    assert record["final"]["test"]["accuracy"] >= 5
    assert 0 < record["training_seconds"] < record["wall_seconds"] + 0.1
    assert [row["step"] for row in rows(record["path"]) if row["kind"] == "eval"][-1] == record["steps"]
    assert json.loads((record["path"] / "record.json").read_text())["reached"]
    other = tiny_run(tmp_path, "target=100", "steps=2")
    assert other["reached"] is False and other["steps"] == 2 and other["path"] != record["path"]
