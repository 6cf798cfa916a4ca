"""Learning rates per step, against torch's own schedulers and the formulas."""

import math
from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler

from phantom.engine.training.schedule import Constant, Cosine, EpochSteps, share_of_run

BASE, TOTAL = 0.2, 30


def rates(schedule, *, per_epoch: int = TOTAL) -> list[float]:
    return [schedule.rate(t, base=BASE, total=TOTAL, epoch=t // per_epoch) for t in range(TOTAL)]


def torch_rates(make) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    scheduler, found = make(optimizer), []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant():
    assert rates(Constant()) == [BASE] * TOTAL


@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.05])
def test_cosine_per_iteration(floor):
    expected = torch_rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=TOTAL, eta_min=floor))
    found = rates(Cosine(floor=floor))
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] == BASE and found[TOTAL // 2] == pytest.approx((BASE + floor) / 2)
    assert all(a > b for a, b in pairwise(found))
    assert Cosine(floor=floor).rate(TOTAL, base=BASE, total=TOTAL, epoch=0) == pytest.approx(floor)


def test_warm_up_is_linear_then_the_cosine_of_step_zero():
    found = rates(Cosine(warmup_steps=5))
    assert found[:5] == pytest.approx([BASE * t / 5 for t in (1, 2, 3, 4, 5)])
    assert found[5:] == pytest.approx([BASE * (1 + math.cos(math.pi * t / TOTAL)) / 2 for t in range(5, TOTAL)])


def test_a_shorter_run_keeps_the_share_of_its_warm_up():
    full = Cosine(warmup_steps=100, of_steps=1000)
    assert rates(full) == rates(Cosine(warmup_steps=3))
    assert rates(Cosine(warmup_steps=3, of_steps=TOTAL)) == rates(Cosine(warmup_steps=3))


@pytest.mark.parametrize(
    ("steps", "of_steps", "total", "share"), [(10, None, 7, 10), (10, 100, 100, 10), (10, 100, 50, 5), (10, 100, 1, 0)]
)
def test_share_of_run(steps, of_steps, total, share):
    assert share_of_run(steps, of_steps, total) == share


def test_steps_at_epochs():
    expected = torch_rates(lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones=[10, 20], gamma=0.1))
    assert rates(EpochSteps(epochs=(2, 4), factor=0.1), per_epoch=5) == pytest.approx(expected)
    assert len(set(expected)) == 3
