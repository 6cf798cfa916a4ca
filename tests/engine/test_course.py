"""k, lam and the depth as functions of the step."""

import math
from dataclasses import replace

import numpy as np
import pytest

from phantom import BPTT, DEQ, NPG, UPG, FixedPoint, Implicit, Rollout
from phantom.engine.training.course import Course, Ramp, RandomDepth
from phantom.engine.training.rules import Rules
from tests.engine import tiny
from train import CONFIGS

SOLVER = Rollout(max_steps=7)
WARM_UP = Ramp(first=2, last=5, steps=20, of_steps=100)


def at(course: Course, grad, step: int, *, total: int = 100, seed: int = 0):
    return course.at(SOLVER, grad, step=step, total=total, seed=seed)


def test_a_ramp_of_k_takes_every_value_for_an_equal_time():
    course = Course(k=WARM_UP)
    found = [at(course, UPG(k=1, lam=0.5), step) for step in range(100)]
    assert all(solver == SOLVER for solver, _ in found)
    # 2, 3, 4 for a third of the first fifth each, then 5
    assert [grad.k for _, grad in found[:21]] == [2 + 3 * step // 20 for step in range(20)] + [5]
    assert {grad for _, grad in found[20:]} == {UPG(k=5, lam=0.5)}
    assert at(course, NPG(k=1, lam=0.5), 3, total=10)[1] == NPG(k=5, lam=0.5), "a shorter run keeps the share"


def test_a_ramp_of_lam_goes_down_too():
    course = Course(lam=Ramp(first=1.0, last=0.5, steps=10))
    assert [at(course, UPG(k=2, lam=0.9), step)[1].lam for step in (0, 5, 10, 70)] == pytest.approx([1, 0.75, 0.5, 0.5])


@pytest.mark.parametrize(
    ("grad", "steps", "expected"),
    [
        (UPG(k=3, lam=1.0), 9, UPG(k=3, lam=1.0)),
        (NPG(k=3, lam=1.0), 11, NPG(k=3, lam=1.0)),
        (Implicit(solver=FixedPoint(max_steps=3, tol=None)), 11, Implicit(solver=FixedPoint(max_steps=3, tol=None))),
        (BPTT(num_steps=2), 7, BPTT(num_steps=12)),
        (UPG(k=20, lam=1.0), 0, UPG(k=12, lam=1.0)),
    ],
)
def test_the_depth_counts_the_steps_behind_the_value(grad, steps, expected):
    course = Course(depth=Ramp(first=12, last=12, steps=1))
    assert at(course, grad, 0) == (replace(SOLVER, max_steps=steps), expected)


def test_a_random_depth_has_its_mean_and_spread_and_belongs_to_the_step():
    rule = RandomDepth(mean=32, sigma=0.5)
    draws = [rule.at(step, 1, 0) for step in range(20_000)]
    # rate ~ log-normal of mean 31: variance = mean of the rate + variance of the rate
    deviation = math.sqrt(31 + 31**2 * (math.exp(0.25) - 1))
    assert min(draws) >= 1
    assert sum(draws) / len(draws) == pytest.approx(32, abs=4 * deviation / math.sqrt(len(draws)))
    spread = math.sqrt(sum((d - 32) ** 2 for d in draws) / len(draws))
    assert spread == pytest.approx(deviation, rel=0.05)
    assert draws[:50] == [rule.at(step, 99, 0) for step in range(50)] != [rule.at(step, 1, 1) for step in range(50)]


def test_the_leaf_draws_the_depths_of_huginn():
    """1 + Poisson(rate), log rate ~ N(log 32 - 1/8, 1/2): Geiping et al. (2025)."""
    leaf = CONFIGS.read("course", "random_depth")["depth"]
    rule = RandomDepth(mean=leaf["mean"], sigma=leaf["sigma"])
    published = np.random.default_rng(0)
    expected = 1 + published.poisson(published.lognormal(np.log(32) - 1 / 8, 1 / 2, size=200_000))
    draws = [rule.at(step, 1, 0) for step in range(20_000)]
    # the standard error of the smaller sample is 0.12
    assert np.mean(draws) == pytest.approx(expected.mean(), abs=0.5)
    assert np.quantile(draws, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(expected, [0.1, 0.5, 0.9]), abs=1)


def test_every_model_follows_the_course_in_training_and_not_in_evaluation(tmp_path):
    model = tiny.Classifier()
    grad = UPG(k=1, lam=0.5)
    model.deq = DEQ(solver=FixedPoint(max_steps=3, tol=None), grad=grad)
    depth = RandomDepth(mean=6)
    course = Course(k=Ramp(first=1, last=3, steps=6), depth=depth)
    rules = Rules(solver=model.deq.solver, grad=grad, seed=5, course=course)
    tiny.trainer(tmp_path, unwrapped=model, rules=rules, budget=tiny.budget(epochs=3, eval_every=1)).fit(resume=False)
    rows = tiny.rows(tmp_path)
    found = [row["num_evals"] for row in rows if row["kind"] == "train"]
    # the solver evaluates f once more than it steps, unless it does not step at all
    expected = []
    for step in range(9):
        steps = depth.at(step, 9, 5)
        k = min(int(1 + 2 * min(1, step / 6)), steps)
        expected.append(steps + (steps > k))
    assert found == expected and len(set(found)) > 3
    assert {row["num_evals"] for row in rows if row["kind"] == "eval"} == {4}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(first=0, last=3, steps=5), "first=0 must be a number > 0"),
        (lambda: Ramp(first=1, last=3, steps=0), "steps=0 must be an integer >= 1"),
        (lambda: RandomDepth(mean=1), r"mean=1 must be in \(1, 500\)"),
        (lambda: RandomDepth(mean=9, sigma=-1), "sigma=-1 must be a number >= 0"),
        (lambda: rules(BPTT(num_steps=3), k=WARM_UP), r"course\.k needs an estimator with k, BPTT has none"),
        (lambda: rules(UPG(k=1, lam=1.0), lam=Ramp(first=1, last=1.5, steps=5)), r"lam=1\.5 must be in \(0, 1\]"),
        (lambda: rules(UPG(k=1, lam=1.0), k=Ramp(first=0.5, last=2, steps=5)), "must stay >= 1"),
    ],
)
def test_impossible_courses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def rules(grad, **course) -> Rules:
    return Rules(solver=SOLVER, grad=grad, seed=0, course=Course(**course))


def test_a_number_is_no_course():
    with pytest.raises(TypeError, match=r"course\.k must be a rule such as Ramp or RandomDepth, got 3"):
        Course(k=3)
