"""Durations by phase with a clock under control."""

from contextlib import nullcontext

import pytest
import torch

from phantom.deq import deqs_of
from phantom.engine.measure import timing
from phantom.engine.measure.timing import StepTimer
from tests.engine import tiny


@pytest.fixture
def clock(monkeypatch):
    """Return `spend(seconds)`, the only thing that moves the clock."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


def step(timer: StepTimer, spend, solve: float, *, items: int = 4, solves: int = 1) -> None:
    """One step of `solves` solves and a second of backward."""
    with timer.phase("step"):
        for _ in range(solves):
            with timer.phase("solve"):
                spend(solve)
        with timer.phase("backward"):
            spend(1.0)
    timer.end_step(items)


def timer(warmup: int = 0) -> StepTimer:
    return StepTimer(torch.device("cpu"), warmup=warmup)


def test_phases_of_a_step(clock):
    watch = timer()
    step(watch, clock, 2.0)
    assert watch.recent() == ({"solve": 2.0, "backward": 1.0, "step": 3.0}, 4 / 3)


def test_recent_is_the_mean_since_the_last_call(clock):
    watch = timer(warmup=1)
    step(watch, clock, 90.0)
    assert watch.recent() == ({}, None)
    for solve, items in ((2.0, 10), (3.0, 10), (7.0, 7)):
        step(watch, clock, solve, items=items)
    assert watch.recent() == ({"solve": 4.0, "backward": 1.0, "step": 5.0}, 27 / 15)
    step(watch, clock, 1.0)
    assert watch.recent() == ({"solve": 1.0, "backward": 1.0, "step": 2.0}, 2.0)
    assert watch.recent() == ({}, None)
    assert watch.summary()["solve"]["n"] == 4  # the record still has them all


def test_a_phase_is_averaged_over_the_steps_that_have_it(clock):
    watch = timer()
    step(watch, clock, 2.0)
    with watch.phase("step"):
        clock(1.0)
    watch.end_step(4)
    assert watch.recent() == ({"solve": 2.0, "backward": 1.0, "step": 2.0}, 2.0)


def test_a_phase_entered_several_times_adds_up(clock):
    watch = timer()
    step(watch, clock, 2.0, solves=3)
    assert watch.recent()[0] == {"solve": 6.0, "backward": 1.0, "step": 7.0}


def test_warm_up_is_left_out(clock):
    watch = timer(warmup=2)
    for solve in (100.0, 50.0):
        step(watch, clock, solve)
        assert watch.recent() == ({}, None) and watch.throughput() is None and watch.summary() == {}
    step(watch, clock, 3.0)
    assert watch.summary()["solve"] == {"median": 3.0, "p10": 3.0, "p90": 3.0, "n": 1}


def test_the_default_warm_up_is_five_steps(clock):
    watch = StepTimer(torch.device("cpu"))
    for i in range(7):
        step(watch, clock, float(i))
    assert watch.summary()["solve"]["n"] == 2 and watch.summary()["solve"]["median"] == 5.5


def test_median_and_spread_do_not_follow_an_outlier(clock):
    watch = timer()
    for solve in (*range(1, 11), 1000):
        step(watch, clock, float(solve))
    assert watch.summary()["solve"] == {"median": 6.0, "p10": 2.0, "p90": 10.0, "n": 11}
    assert list(watch.summary()) == ["solve", "backward", "step"]


def test_throughput_counts_items_over_step_time_only(clock):
    watch = timer()
    step(watch, clock, 1.0, items=10)
    clock(1000.0)  # data, evaluation, checkpoints
    step(watch, clock, 2.0, items=6)
    assert watch.throughput() == pytest.approx(16 / 5)


def test_phases_outside_a_step_are_forgotten(clock):
    watch = timer()
    step(watch, clock, 1.0)
    with watch.phase("solve"):
        clock(100.0)  # an evaluation
    watch.take_marks()
    step(watch, clock, 2.0)
    assert watch.recent()[0]["solve"] == 1.5


def test_a_phase_that_fails_is_still_timed(clock):
    watch = timer()
    with pytest.raises(RuntimeError), watch.phase("solve"):
        clock(3.0)
        raise RuntimeError
    watch.end_step(1)
    assert watch.recent() == ({"solve": 3.0}, None)


def test_a_long_run_describes_its_last_steps(clock, monkeypatch):
    monkeypatch.setattr(timing, "WINDOW", 4)
    watch = timer()
    for i in range(10):
        step(watch, clock, float(i))
    assert watch.summary()["solve"] == {"median": 7.5, "p10": 6.0, "p90": 8.0, "n": 4}


def test_marks_can_be_kept_and_counted_again(clock):
    """As the marks of a captured graph are, at every replay."""
    watch = timer()
    with watch.phase("solve"):
        clock(2.0)
    marks = watch.take_marks()
    with watch.phase("optimizer"):
        clock(1.0)
    watch.add_marks(marks)
    watch.end_step(1)
    assert watch.recent()[0] == {"optimizer": 1.0, "solve": 2.0}


def test_the_average_of_the_weights_is_evaluated_without_a_clock(tmp_path):
    run = tiny.trainer(tmp_path, ema_decay=0.9)
    run.fit(resume=False)
    assert run.evaluated_model is not run.unwrapped
    assert [deq.clock for deq in deqs_of(run.evaluated_model)] == [nullcontext]
    assert [deq.clock for deq in deqs_of(run.unwrapped)] == [run.timer.phase]
