"""What depends on the step: jitter of the solver's budget, the penalty's weight and frequency, pretraining."""

from collections import Counter
from dataclasses import replace

import pytest

from phantom import BPTT, DEQ, UPG, FixedPoint, JacobianRegularizer, Rollout
from phantom.engine.training.course import Course, Ramp
from phantom.engine.training.rules import Jitter, Penalty, Pretraining, Rules
from tests.engine import tiny

SOLVER = FixedPoint(max_steps=12, tol=None)
GRAD = UPG(k=2, lam=0.5)


def rules(**changes) -> Rules:
    return Rules(**({"solver": SOLVER, "grad": GRAD, "seed": 0} | changes))


def budgets(folder, rules: Rules, **changes) -> dict[str, list[float]]:
    """Return the evaluations of f that training steps and evaluations took, with the equilibrium's own budget fixed."""
    model = tiny.Classifier()
    model.deq = DEQ(solver=SOLVER, grad=GRAD, confirm=False, **changes)
    run = tiny.trainer(folder, unwrapped=model, rules=rules, budget=tiny.budget(epochs=6, eval_every=1))
    run.fit(resume=False)
    rows = tiny.rows(folder)
    return {kind: [row["num_evals"] for row in rows if row["kind"] == kind] for kind in ("train", "eval")}


def test_jitter_changes_the_training_budget_only(tmp_path):
    """Evaluation uses the configured solver, not what the last step left."""
    jitter = Jitter(below=5)
    found = budgets(tmp_path, rules(jitter=jitter))
    plain = budgets(tmp_path / "plain", rules())
    (full,), (evaluation,) = set(plain["train"]), set(plain["eval"])
    assert full - evaluation == GRAD.k and evaluation == SOLVER.max_steps + 1
    assert found["train"] == [full + jitter.at(step, 0) for step in range(18)]
    assert len(set(found["train"])) > 3
    assert set(found["eval"]) == {evaluation}


def test_an_evaluation_solver_of_its_own_is_used(tmp_path):
    found = budgets(tmp_path, rules(jitter=Jitter(below=5)), eval_solver=FixedPoint(max_steps=30, tol=None))
    assert set(found["eval"]) == {31}


def test_jitter_is_uniform_over_its_range_and_depends_on_the_seed():
    draws = [Jitter(below=3).at(step, 0) for step in range(4000)]
    counts = Counter(draws)
    assert sorted(counts) == [-3, -2, -1, 0]
    assert all(count == pytest.approx(1000, abs=120) for count in counts.values())  # four standard deviations
    assert draws != [Jitter(below=3).at(step, 1) for step in range(4000)]


def test_jitter_leaves_at_least_one_step():
    layer = DEQ(solver=SOLVER, grad=GRAD)
    seen = set()
    for step in range(50):
        rules(solver=replace(SOLVER, max_steps=2), jitter=Jitter(below=9)).apply([layer], step, 50)
        seen.add(layer.solver.max_steps)
    assert seen == {1, 2}


def test_the_penalty_grows_in_stages_and_stops():
    penalty = Penalty(regularizer=JacobianRegularizer(), weight=0.5, increment=0.1, increment_every=10, stop_step=35)
    weights = [penalty.at(step, 0) for step in range(40)]
    stages = [0.5] * 10 + [0.6] * 10 + [0.7] * 10 + [0.8] * 5 + [0.0] * 5
    assert weights == pytest.approx(stages)


def test_the_penalty_of_a_shorter_run_keeps_its_shares():
    full = Penalty(regularizer=JacobianRegularizer(), weight=0.5, increment=0.1, increment_every=100, stop_step=350)
    shared = replace(full, of_steps=400)
    assert [shared.at(step, 0, 400) for step in range(400)] == [full.at(step, 0) for step in range(400)]
    assert [shared.at(step, 0, 40) for step in range(40)] == [full.at(10 * step, 0) for step in range(40)]
    assert shared.at(3, 0, 4) == full.at(300, 0) and shared.at(0, 0, 1) == 0.5
    endless = replace(shared, stop_step=None)
    for total in (3, 7, 15, 27, 401):  # of none of which a stage is a whole number of steps
        weights = [endless.at(step, 0, total) for step in range(total)]
        assert weights == [endless.at(step * 400 // total, 0) for step in range(total)] and max(weights) <= 0.8
    assert full.at(39, 0, 40) == 0.5, "without of_steps the steps are as they stand"


def test_the_penalty_applies_to_its_share_of_the_steps():
    penalty = Penalty(regularizer=JacobianRegularizer(), weight=0.5, frequency=0.3)
    layer = DEQ(solver=SOLVER, grad=GRAD)
    active = 0
    for step in range(2000):
        weight = rules(penalty=penalty).apply([layer], step, 2000)
        assert weight in (0.0, 0.5)
        assert layer.regularizer is (penalty.regularizer if weight else None)
        active += weight > 0
    assert active == pytest.approx(600, abs=82)  # four standard deviations


def test_an_evaluation_has_no_penalty_and_no_jitter():
    layer = DEQ(solver=SOLVER, grad=GRAD)
    both = rules(penalty=Penalty(regularizer=JacobianRegularizer(), weight=0.5), jitter=Jitter(below=5))
    both.apply([layer], 3, 10)
    assert layer.regularizer is not None
    both.restore([layer])
    assert layer.regularizer is None and layer.solver == SOLVER


def test_pretraining_unrolls_then_solves(tmp_path):
    pretraining = Pretraining(steps=4, layers=3)
    found = budgets(tmp_path, rules(pretraining=pretraining, jitter=Jitter(below=5)))
    assert found["train"][:4] == [3] * 4 and min(found["train"][4:]) >= SOLVER.max_steps - 5
    assert set(found["eval"]) == {SOLVER.max_steps + 1}


def test_pretraining_has_no_penalty_and_ends():
    layer = DEQ(solver=SOLVER, grad=GRAD)
    both = rules(
        pretraining=Pretraining(steps=2, layers=3), penalty=Penalty(regularizer=JacobianRegularizer(), weight=0.5)
    )
    assert [both.apply([layer], step, 10) for step in range(4)] == [0.0, 0.0, 0.5, 0.5]
    both.apply([layer], 1, 10)
    assert layer.grad == BPTT(num_steps=3) and layer.regularizer is None
    both.apply([layer], 2, 10)
    assert layer.grad == GRAD and layer.solver == SOLVER


def test_a_shorter_run_keeps_the_share_of_pretraining():
    phase = Pretraining(steps=100, layers=3, of_steps=1000)
    assert sum(phase.active(step, 50) for step in range(50)) == 5
    assert sum(phase.active(step, 1000) for step in range(1000)) == 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jitter(below=0), r"jitter\.below"),
        (lambda: Pretraining(steps=0, layers=3), r"pretraining\.steps"),
        (lambda: Pretraining(steps=1, layers=0), r"pretraining\.layers"),
        (lambda: Penalty(regularizer=JacobianRegularizer(), weight=-1.0), r"weight=-1\.0 must be a number >= 0"),
        (lambda: Penalty(regularizer=JacobianRegularizer(), weight=1.0, frequency=0.0), r"frequency=0\.0 .*\(0, 1\]"),
        (lambda: Penalty(regularizer=JacobianRegularizer(), weight=1.0, of_steps=0), r"penalty\.of_steps"),
    ],
)
def test_impossible_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_course_and_jitter_and_a_penalty_of_another_seed():
    penalty, jitter = Penalty(regularizer=JacobianRegularizer(), weight=0.5, frequency=0.5), Jitter(below=5)
    course = Course(depth=Ramp(first=20, last=20, steps=1))
    layer = DEQ(solver=Rollout(max_steps=9), grad=UPG(k=2))
    rules = Rules(solver=layer.solver, grad=layer.grad, seed=1, penalty=penalty, jitter=jitter, course=course)
    found = []
    for step in range(40):
        found.append(rules.apply([layer], step, 40))
        assert layer.solver.max_steps == 18 + jitter.at(step, 1)
    assert found == [penalty.at(step, 1) for step in range(40)] != [penalty.at(step, 0) for step in range(40)]


def test_jitter_and_penalty_are_drawn_apart():
    penalty, jitter = Penalty(regularizer=JacobianRegularizer(), weight=0.5, frequency=0.5), Jitter(below=5)
    shallow = [penalty.at(step, 1) > 0 for step in range(2000) if jitter.at(step, 1) <= -4]
    assert sum(shallow) / len(shallow) == pytest.approx(0.5, abs=0.1)


def test_a_layer_that_a_model_makes_itself_keeps_its_settings(tmp_path):
    class Inner(tiny.Classifier):
        def __init__(self):
            super().__init__()
            self.deq = DEQ(solver=SOLVER, grad=GRAD, confirm=False)
            self.inner = DEQ(solver=FixedPoint(max_steps=3, tol=None), grad=BPTT(num_steps=2), confirm=False)

        def forward(self, x, z0=None):
            seen.append((self.inner.solver, self.inner.grad, self.deq.solver.max_steps))
            logits, solutions = super().forward(x, z0)
            self.inner(self.cell.bind(self.encoder(x)), solutions[0].value)
            return logits, solutions

    seen = []
    model = Inner()
    tiny.trainer(tmp_path, unwrapped=model, rules=rules(jitter=Jitter(below=5))).fit(resume=False)
    assert {(solver, grad) for solver, grad, _ in seen} == {(model.inner.solver, model.inner.grad)}
    assert model.inner.solver.max_steps == 3 and len({steps for *_, steps in seen}) > 2
