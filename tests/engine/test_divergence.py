"""A number that is not finite stops the run at once, names the step, and leaves what was good."""

import math

import pytest
import torch

from phantom.engine.artifacts import checkpoint
from phantom.engine.errors import DivergenceError
from phantom.engine.measure.monitor import Monitor
from phantom.engine.tasks.base import Score, Tally
from phantom.engine.tasks.images import ImageClassification
from phantom.engine.training.clipping import ClipEach, ClipTotal
from tests.engine import tiny

BAD = 5  # the step, counted from 1, whose batch is broken; epochs have three steps


class Broken(tiny.Vectors):
    """Vectors with a NaN in one batch."""

    def train(self, *, epoch, start, shard):
        for i, batches in enumerate(super().train(epoch=epoch, start=start, shard=shard), start):
            if epoch * self.steps(epoch) + i + 1 == BAD:
                batches[0][0][0, 0] = math.nan
            yield batches


class BrokenLoss(ImageClassification):
    """A loss that overflows at one step while its gradient stays finite."""

    calls = 0

    def score(self, model, batch, carry):
        score = super().score(model, batch, carry)
        if not model.training:
            return score
        self.calls += 1
        tally = score.tally
        add = math.inf if self.calls == BAD else 0.0
        return Score(Tally(tally.loss_sum + add, tally.count, tally.sums), score.solutions, None)


class BrokenGradient(ImageClassification):
    """A gradient that is `number` at one step, under the loss as it was."""

    def __init__(self, number: float) -> None:
        self.number, self.calls = number, 0

    def score(self, model, batch, carry):
        score = super().score(model, batch, carry)
        if not model.training:
            return score
        self.calls += 1
        tally = score.tally
        if self.calls == BAD:
            nothing = tally.loss_sum - tally.loss_sum.detach()
            nothing.register_hook(lambda gradient: gradient * self.number)
            tally.loss_sum = tally.loss_sum.detach() + nothing
        return Score(tally, score.solutions, None)


def finite(state: dict) -> bool:
    return all(bool(value.isfinite().all()) for value in state["model"].values())


def diverge(folder, **changes) -> str:
    with pytest.raises(DivergenceError) as stopped:
        tiny.trainer(folder, **changes).fit(resume=True)
    return str(stopped.value)


@pytest.mark.parametrize("log_every", [1, 4, 100])
@pytest.mark.parametrize("checkpoint_every", [None, 1])
def test_a_broken_batch(tmp_path, log_every, checkpoint_every):
    budget = tiny.budget(epochs=3, log_every=log_every, checkpoint_every=checkpoint_every)
    message = diverge(tmp_path, source=Broken(), budget=budget)
    assert f"at step {BAD} (epoch 1)" in message and str(tmp_path / "last.pt") in message
    for advice in ("optimizer.lr", "clipping=total", "solver.max_steps", "precision=fp32", "broken batch"):
        assert advice in message
    last, best = (checkpoint.load(tmp_path / name) for name in ("last.pt", "best.pt"))
    assert last["step"] == (BAD - 1 if checkpoint_every else 3) and best["step"] == 3
    assert finite(last) and finite(best)
    rows = tiny.rows(tmp_path)
    assert len([row for row in rows if row["kind"] == "eval"]) == 2
    assert max(row["step"] for row in rows) < BAD
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_the_run_goes_on_from_the_last_good_checkpoint(tmp_path):
    diverge(tmp_path, source=Broken())
    tiny.trainer(tmp_path).fit(resume=True)
    whole = tiny.trainer(tmp_path / "whole")
    whole.fit(resume=False)
    assert tiny.rows(tmp_path) == tiny.rows(tmp_path / "whole")
    assert tiny.same(checkpoint.load(tmp_path / "last.pt")["model"], whole.unwrapped.state_dict())


def test_a_loss_that_overflows_alone(tmp_path):
    assert f"at step {BAD} " in diverge(tmp_path, task=BrokenLoss(), budget=tiny.budget(log_every=100))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3


@pytest.mark.parametrize("clipping", [None, ClipTotal(max_norm=0.5), ClipEach(max_norm=0.5)])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_gradient_that_breaks_under_a_finite_loss(tmp_path, number, clipping):
    budget = tiny.budget(log_every=100, checkpoint_every=1)
    message = diverge(tmp_path, task=BrokenGradient(number), clipping=clipping, budget=budget)
    assert f"at step {BAD} (epoch 1)" in message
    last = checkpoint.load(tmp_path / "last.pt")
    assert last["step"] == BAD - 1 and finite(last)


def test_a_finite_factor_on_the_gradient_stops_nothing(tmp_path):
    """The stand-in for a broken gradient breaks nothing by itself."""
    run = tiny.trainer(tmp_path, task=BrokenGradient(1.0))
    run.fit(resume=False)
    whole = tiny.trainer(tmp_path / "whole")
    whole.fit(resume=False)
    assert tiny.same(run.unwrapped.state_dict(), whole.unwrapped.state_dict())


def test_weights_that_grow_without_bound(tmp_path):
    model = tiny.Classifier()
    message = diverge(
        tmp_path,
        unwrapped=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e200),
        budget=tiny.budget(epochs=20),
    )
    assert "stopped being finite at step" in message


def test_a_measurement_does_not_meet_the_broken_weights(tmp_path):
    """Eigenvalues of a matrix of NaN would end the run with another error."""
    monitor = Monitor(every=BAD, radius_steps=3)
    assert f"at step {BAD} " in diverge(tmp_path, source=Broken(), monitor=monitor, budget=tiny.budget(log_every=100))


def test_the_tracker_is_closed(tmp_path):
    closed = []

    class Recording:
        def __init__(self, fresh):
            pass

        def log(self, row):
            pass

        def abort(self):
            closed.append("abort")

    diverge(tmp_path, source=Broken(), make_tracker=Recording)
    assert closed == ["abort"]
