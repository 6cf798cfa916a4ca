"""A carry goes from a micro-batch to the same micro-batch of the next step, and ends with its epoch."""

from typing import Any

import pytest
import torch
from torch import nn

from phantom.engine.measure.monitor import Monitor
from phantom.engine.tasks.base import Score
from phantom.engine.tasks.images import ImageClassification
from tests.engine import tiny
from tests.engine.tiny import Killed, Killing, Shard

STEPS = 3  # of an epoch


class Relay(ImageClassification):
    """Carry the inputs of every batch to the next one, and note the carries that arrive."""

    def __init__(self) -> None:
        self.trained: list[tuple[Any, Any]] = []
        self.evaluated: list[tuple[Any, Any]] = []

    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        (self.trained if model.training else self.evaluated).append((batch[0], carry))
        return super().score(model, batch, carry)._replace(carry=batch[0])


def assert_relayed(seen: list[tuple[Any, Any]], *, micro: int, steps: int) -> None:
    """Check the carries of passes of `steps` steps: none in the first step, then the inputs of the step before."""
    for i, (_, carry) in enumerate(seen):
        if i % (steps * micro) < micro:
            assert carry is None, "an epoch, and an evaluation, starts without a past"
        else:
            assert carry is not None and torch.equal(carry, seen[i - micro][0])


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_carries_of_an_epoch(tmp_path, micro):
    task = Relay()
    tiny.trainer(tmp_path, task=task, shard=Shard(micro=micro), budget=tiny.budget(epochs=3)).fit(resume=False)
    assert len(task.trained) == 3 * STEPS * micro
    assert_relayed(task.trained, micro=micro, steps=STEPS)


def test_evaluations_start_without_a_past_and_leave_that_of_training_alone(tmp_path):
    task = Relay()
    tiny.trainer(tmp_path, task=task, shard=Shard(micro=2), budget=tiny.budget(eval_every=1)).fit(resume=False)
    assert len(task.evaluated) == 6 * 2 * 3, "six evaluations of two splits, in batches of 5, 5 and 2"
    assert_relayed(task.evaluated, micro=1, steps=3)
    assert_relayed(task.trained, micro=2, steps=STEPS)


def test_the_monitor_measures_the_step_with_the_carry_that_it_had(tmp_path):
    task, monitor = Relay(), Monitor(every=1, radius_steps=2)
    tiny.trainer(tmp_path, task=task, monitor=monitor, budget=tiny.budget(epochs=1)).fit(resume=False)
    assert len(task.trained) == 2 * STEPS
    for step in range(STEPS):
        (batch, carry), (again, measured) = task.trained[2 * step : 2 * step + 2]
        assert torch.equal(batch, again) and measured is carry


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_resumed_run_has_its_carries(tmp_path, step):
    """Stopped between two epochs, or within the second one."""
    task = Relay()
    options = {"task": task, "shard": Shard(micro=2), "budget": tiny.budget(epochs=3, checkpoint_every=1)}
    with pytest.raises(Killed):
        tiny.trainer(tmp_path, source=Killing(step=step), **options).fit(resume=True)
    assert len(task.trained) == 2 * step
    tiny.trainer(tmp_path, **options).fit(resume=True)
    assert len(task.trained) == 3 * STEPS * 2
    assert_relayed(task.trained, micro=2, steps=STEPS)
