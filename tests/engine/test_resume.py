"""A run that is interrupted anywhere and resumed is the unbroken run, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from phantom import JacobianRegularizer
from phantom.engine.artifacts import checkpoint, records
from phantom.engine.source import drawn_apart
from phantom.engine.tasks.base import Score, Tally
from phantom.engine.training.loop import Trainer
from phantom.engine.training.rules import Jitter, Penalty, Rules
from phantom.engine.training.schedule import Schedule
from tests.engine import tiny
from tests.engine.tiny import Killed, Killing

STEPS = 9  # three epochs of three


class Stream(IterableDataset):
    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Loading(Killing):
    """The same vectors by torch's DataLoader, which draws from the global generator whenever it begins."""

    def train(self, **where):
        return DataLoader(Stream(super().train(**where)), batch_size=None)

    def evaluate(self, split, **where):
        yield from DataLoader(Stream(super().evaluate(split, **where)), batch_size=None)


def fit(folder: Path, *, source=None, log_every: int = 1) -> Trainer:
    """Train (on) with everything that has a state: dropout, batch statistics, average, carries, momenta, rules."""
    torch.manual_seed(0)
    model = tiny.Classifier(dropout=0.3, batch_norm=True)
    rules = Rules(
        solver=tiny.SOLVER,
        grad=tiny.GRAD,
        seed=0,
        penalty=Penalty(regularizer=JacobianRegularizer(), weight=0.1, frequency=0.5),
        jitter=Jitter(below=50),
    )
    trainer = tiny.trainer(
        folder,
        unwrapped=model,
        task=tiny.WarmStart(),
        source=source or tiny.Vectors(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        rules=rules,
        budget=tiny.budget(epochs=3, checkpoint_every=2, log_every=log_every),
        ema_decay=0.8,
        shard=tiny.Shard(micro=2),
    )
    trainer.fit(resume=True)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    for name in ("last.pt", "best.pt"):
        found, expected = (checkpoint.load(each / name) for each in (folder, whole))
        for key in expected.keys() - tiny.CLOCKED:
            assert tiny.same(found[key], expected[key]), (name, key)
    assert tiny.rows(folder) == tiny.rows(whole)


def test_the_unbroken_run_has_every_kind_of_state(whole):
    state = checkpoint.load(whole / "last.pt")
    assert state["step"] == STEPS
    (own,) = state["ranks"]
    assert [carry.shape for carry in own["carries"]] == [(1, 5), (1, 5)]
    assert "norm.running_mean" in state["model"]
    assert state["ema"].keys() == state["model"].keys() and not tiny.same(state["ema"], state["model"])
    rows = [row for row in tiny.rows(whole) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert 0 < sum("penalty" in row for row in rows) < STEPS
    assert len({row["num_evals"] for row in rows}) > 4  # the jitter


@pytest.mark.parametrize("step", range(STEPS))
def test_stopped_before_any_step(tmp_path, whole, step):
    with pytest.raises(Killed):
        fit(tmp_path, source=Killing(step=step))
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("evaluation", range(6))
def test_stopped_in_the_middle_of_an_evaluation(tmp_path, whole, evaluation):
    with pytest.raises(Killed):
        fit(tmp_path, source=Killing(evaluation=evaluation))
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("written", [False, True])
def test_stopped_around_a_checkpoint(tmp_path, whole, monkeypatch, name, number, written):
    """Between the best and the last checkpoint of one evaluation, and between a checkpoint and the next step."""
    save, seen = checkpoint.save, []

    def killed(path, state):
        seen.append(path.name)
        stop = path.name == name and seen.count(name) == number + 1
        if written or not stop:
            save(path, state)
        if stop:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", killed)
    try:
        fit(tmp_path)
    except Killed:
        monkeypatch.undo()
        fit(tmp_path)
    else:
        assert name == "best.pt" and seen.count(name) <= number  # it was the best less often
    assert_same_run(tmp_path, whole)


def test_a_process_that_timed_no_step_reports_what_the_one_before_measured(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, source=Killing(evaluation=5))  # after the last step
    measured = checkpoint.load(tmp_path / "last.pt")["measured"]
    assert measured["times"]["solve"]["n"] == 3, "of eight steps, without the warm-up"
    assert measured["items_per_second"] > 0 and measured["peak_memory"] > 0 and "CPU" in measured["device"]
    assert fit(tmp_path).measured == measured
    assert checkpoint.load(tmp_path / "last.pt")["measured"] == measured


def test_stopped_again_and_again(tmp_path, whole):
    for source in (Killing(step=1), Killing(step=4), Killing(evaluation=1), Killing(step=8)):
        with pytest.raises(Killed):
            fit(tmp_path, source=source)
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


def test_rows_after_the_checkpoint_are_written_once(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, source=Killing(step=5))
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"kind": "train", "st')  # what a killed process leaves
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    fit(tmp_path)
    assert [row["step"] for row in tiny.rows(tmp_path) if row["kind"] == "train"] == list(range(1, STEPS + 1))


def test_rows_are_the_same_when_they_cover_several_steps(tmp_path):
    fit(tmp_path / "whole", log_every=5)
    with pytest.raises(Killed):
        fit(tmp_path / "parts", source=Killing(step=7), log_every=5)
    fit(tmp_path / "parts", log_every=5)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_is_not_trained_further(tmp_path, whole):
    fit(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "last.pt").read_bytes()
    fit(tmp_path, source=Killing(step=0))
    assert before == ((tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "last.pt").read_bytes())


@pytest.mark.parametrize("step", [None, 4, 7])
def test_a_source_moves_no_number_of_the_model(tmp_path, whole, step):
    """Neither where it draws from torch's global generator, nor where it does so once more after a stop."""
    if step is not None:
        with pytest.raises(Killed):
            fit(tmp_path, source=Loading(step=step))
    fit(tmp_path, source=Loading())
    assert_same_run(tmp_path, whole)


def test_the_draws_of_a_source_are_its_own_in_every_epoch():
    """A model that draws nothing leaves the global generator where it is: the order changes all the same."""

    def order(epoch: int) -> list[int]:
        return list(drawn_apart(lambda: DataLoader(range(20), batch_size=None, shuffle=True), f"train/{epoch}"))

    torch.manual_seed(3)
    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) == list(range(20)) and first != second and order(0) == first
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)
    torch.manual_seed(4)
    assert order(0) != first


class NumpySource(Killing):
    def digests(self):
        return {"train": np.uint64(7)}


class NumpySchedule(Schedule):
    def rate(self, t, *, base, total, epoch):
        return base * np.cos(np.float32(t / total))


class NumpyTask(tiny.WarmStart):
    def score(self, model, batch, carry):
        found = super().score(model, batch, carry)
        return Score(Tally(found.tally.loss_sum, np.int64(found.tally.count)), found.solutions, found.carry)

    def report(self, tally):
        return {"loss": np.sqrt(float(tally.loss_sum) / tally.count), "error": np.float32(0.5)}


def test_numbers_of_numpy_reach_neither_checkpoints_nor_records(tmp_path):
    def run(step):
        parts = {"source": NumpySource(step=step), "schedule": NumpySchedule(), "task": NumpyTask()}
        trainer = tiny.trainer(tmp_path, **parts, budget=tiny.budget(checkpoint_every=1, log_every=2))
        trainer.fit(resume=True)
        return trainer

    with pytest.raises(Killed):
        run(step=5)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 5
    trainer = run(step=None)
    assert trainer.step == 6
    assert {type(value) for found in trainer.final.values() for value in found.values()} <= {bool, int, float}
    assert records.to_json({"digests": trainer.data.digests, "rate": np.float32(0.5)}) == (
        '{"digests": {"train": 7}, "rate": 0.5}'
    )
