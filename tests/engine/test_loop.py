"""One optimiser step does what the formula says, and a run looks, saves and selects when its budget says."""

import json
import time
from copy import deepcopy
from math import nan

import pytest
import torch
import torch.nn.functional as F

from phantom.engine.artifacts import checkpoint
from phantom.engine.errors import DataError
from phantom.engine.tasks.images import ImageClassification
from phantom.engine.training.clipping import ClipTotal
from phantom.engine.training.evaluation import evaluate
from phantom.engine.training.rules import Penalty, Rules
from phantom.engine.training.schedule import Constant, Cosine, EpochSteps
from tests.engine import tiny
from tests.engine.two_ranks import activity

TIGHT = {"rtol": 1e-12, "atol": 1e-13}
WEIGHT = 0.3


def penalised() -> Rules:
    penalty = Penalty(regularizer=activity, weight=WEIGHT)
    return Rules(solver=tiny.SOLVER, grad=tiny.GRAD, seed=0, penalty=penalty)


def plain_sgd(model, *, rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate)


def batches(source: tiny.Vectors, epochs: int = 2) -> list:
    """Return the whole batches of a run in their order."""
    return [batch for epoch in range(epochs) for (batch,) in source.train(epoch=epoch, start=0, shard=tiny.Shard())]


def test_the_wall_clock_is_that_of_all_processes(tmp_path):
    begin = time.monotonic()
    first = tiny.trainer(tmp_path, budget=tiny.budget(steps=2))
    first.fit(resume=False)
    state = checkpoint.load(tmp_path / "last.pt")
    assert 0 < state["seconds"]["total"] <= first.stopwatch.total < time.monotonic() - begin
    assert 0 < state["seconds"]["training"] == first.stopwatch.training < state["seconds"]["total"]
    checkpoint.save(tmp_path / "last.pt", state | {"seconds": 3600.0})  # as early checkpoints have it
    begin = time.monotonic()
    resumed = tiny.trainer(tmp_path)
    resumed.fit(resume=True)
    assert 3600 < resumed.stopwatch.training < resumed.stopwatch.total < 3600 + time.monotonic() - begin


@pytest.mark.parametrize("micro", [2, 4])
def test_accumulation_changes_nothing(tmp_path, micro):
    """Eleven examples in batches of four: the last of three makes micro-batches of unequal size."""
    runs = []
    for parts in (1, micro):
        run = tiny.trainer(
            tmp_path / str(parts),
            source=tiny.Vectors(count=11),
            shard=tiny.Shard(micro=parts),
            rules=penalised(),
            clipping=ClipTotal(max_norm=0.5),
        )
        run.fit(resume=False)
        runs.append(run)
    for a, b in zip(*(run.unwrapped.parameters() for run in runs), strict=True):
        torch.testing.assert_close(b, a, **TIGHT)
    for a, b in zip(*(tiny.rows(run.folder) for run in runs), strict=True):
        for key in {"loss", "accuracy", "gradient_norm", "lr", "penalty"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-11), key


def test_a_step_is_the_clipped_mean_gradient_times_the_rate_of_that_step(tmp_path):
    """Two steps by hand: mean loss, its gradient scaled to norm 0.5, weights moved by the cosine's rate."""
    model = tiny.Classifier()
    by_hand = deepcopy(model)
    run = tiny.trainer(
        tmp_path,
        unwrapped=model,
        optimizer=plain_sgd(model),
        schedule=Cosine(floor=0.02),
        clipping=ClipTotal(max_norm=0.5),
        budget=tiny.budget(steps=2),
    )
    run.fit(resume=False)
    rates, norms = [0.1, (0.1 + 0.02) / 2], []  # cos(0) = 1, cos(pi / 2) = 0
    for (x, y), rate in zip(batches(run.source), rates, strict=False):
        loss = F.cross_entropy(by_hand(x)[0], y)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        assert norms[-1] > 0.5
        with torch.no_grad():
            for weight, gradient in zip(by_hand.parameters(), gradients, strict=True):
                weight -= rate * 0.5 / norms[-1] * gradient
    for a, b in zip(by_hand.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-9)  # torch adds 1e-6 to the norm it divides by
    rows = [row for row in tiny.rows(tmp_path) if row["kind"] == "train"]
    assert [row["lr"] for row in rows] == pytest.approx(rates)
    assert [row["gradient_norm"] for row in rows] == pytest.approx([float(norm) for norm in norms], rel=1e-5)


@pytest.mark.parametrize("stopped", [None, 4])
@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (Cosine(floor=0.0), [1, (1 + 3**0.5 / 2) / 2, 0.75, 0.5, 0.25, (1 - 3**0.5 / 2) / 2]),  # cos(pi t / 6)
        (EpochSteps(epochs=(0, 1), factor=0.5), [0.5, 0.5, 0.5, 0.25, 0.25, 0.25]),
        (Cosine(floor=0.0, warmup_steps=4), [0.25, 0.5, 0.75, 1, 0.25, (1 - 3**0.5 / 2) / 2]),
    ],
)
def test_the_rate_of_a_step_is_a_share_of_the_base_rate(tmp_path, schedule, shares, stopped):
    """Of each group's own base rate, never of the rate of the step before; and so after resuming."""
    seen = []

    def fit(source: tiny.Vectors) -> None:
        model = tiny.Classifier()
        groups = [{"params": model.head.parameters(), "lr": 0.1}, {"params": model.encoder.parameters(), "lr": 0.02}]
        optimizer = torch.optim.SGD(groups)
        optimizer.register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
        options = {"schedule": schedule, "budget": tiny.budget(checkpoint_every=1)}
        tiny.trainer(tmp_path, unwrapped=model, optimizer=optimizer, source=source, **options).fit(resume=True)

    if stopped is not None:
        with pytest.raises(tiny.Killed):
            fit(tiny.Killing(step=stopped))
        assert len(seen) == stopped
    fit(tiny.Vectors())
    assert len(seen) == 6
    for rates, share in zip(seen, shares, strict=True):
        assert rates == pytest.approx([0.1 * share, 0.02 * share])
    logged = [row["lr"] for row in tiny.rows(tmp_path) if row["kind"] == "train"]
    assert logged == pytest.approx([0.1 * share for share in shares])


@pytest.mark.parametrize("solves", [1, 2])
def test_the_penalty_of_every_solve_enters_the_mean_loss(tmp_path, solves):
    class Repeated(tiny.Classifier):
        def forward(self, x, z0=None):
            scores = [super(Repeated, self).forward(x + i) for i in range(solves)]
            return scores[0][0], tuple(solution for _, (solution,) in scores)

    model = Repeated()
    before = deepcopy(model)
    run = tiny.trainer(
        tmp_path,
        unwrapped=model,
        optimizer=plain_sgd(model),
        schedule=Constant(),
        rules=penalised(),
        budget=tiny.budget(steps=1),
    )
    run.fit(resume=False)
    x, y = batches(run.source)[0]
    before.deq.regularizer = activity
    logits, solutions = before(x)
    penalties = [solution.penalty for solution in solutions]
    loss = F.cross_entropy(logits, y) + WEIGHT * sum(penalties)
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    for start, gradient, end in zip(before.parameters(), gradients, model.parameters(), strict=True):
        torch.testing.assert_close(end, start - 0.1 * gradient, **TIGHT)
    row = tiny.rows(tmp_path)[0]
    assert row["penalty"] == pytest.approx(sum(penalties).item() / solves)
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, y).item())  # the penalty is not part of it


def test_the_moving_average_is_what_is_evaluated(tmp_path):
    model = tiny.Classifier()
    seen = []
    optimizer = plain_sgd(model, rate=0.5)
    optimizer.register_step_post_hook(lambda *_: seen.append(deepcopy(model.state_dict())))
    run = tiny.trainer(tmp_path, unwrapped=model, optimizer=optimizer, ema_decay=0.75, budget=tiny.budget(epochs=1))
    run.fit(resume=False)
    average = seen[0]
    for weights in seen[1:]:
        average = {name: 0.75 * value + 0.25 * weights[name] for name, value in average.items()}
    for weights, agrees in ((average, True), (seen[-1], False)):
        other = tiny.Classifier()
        other.load_state_dict(weights)
        with torch.no_grad():
            logits, _ = other.eval()(run.source.inputs["test"])
        loss = float(F.cross_entropy(logits, run.source.labels("test")))
        assert (run.final["test"]["loss"] == pytest.approx(loss, rel=1e-10)) is agrees


@pytest.mark.parametrize(
    ("changes", "evaluations", "checkpoints"),
    [
        ({}, [3, 6], [3, 6]),
        ({"steps": 4}, [3, 4], [3, 4]),
        ({"steps": 100}, [3, 6], [3, 6]),
        ({"eval_every": 2, "steps": 5}, [2, 4, 5], [2, 4, 5]),
        ({"eval_every": 4}, [4, 6], [4, 6]),
        ({"checkpoint_every": 2}, [3, 6], [2, 3, 4, 6]),
    ],
)
def test_when_a_run_evaluates_and_saves(tmp_path, monkeypatch, changes, evaluations, checkpoints):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append((path.name, state["step"])))
    run = tiny.trainer(tmp_path, budget=tiny.budget(**changes))
    run.fit(resume=False)
    rows = tiny.rows(tmp_path)
    for split in ("valid", "test"):
        assert [row["step"] for row in rows if row.get("split") == split] == evaluations
    assert [step for name, step in saved if name == "last.pt"] == checkpoints
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, run.step + 1))
    assert run.step == evaluations[-1]


@pytest.mark.parametrize(("task", "best"), [(tiny.ImageClassification, max), (tiny.WarmStart, min)])
def test_the_first_split_selects_the_best_checkpoint(tmp_path, task, best):
    """`best` is what the chosen checkpoint gives on every split, not the best of every split."""
    model = tiny.Classifier()
    restless = torch.optim.SGD(model.parameters(), lr=1.7, momentum=0.9)
    run = tiny.trainer(
        tmp_path,
        unwrapped=model,
        task=task(),
        source=tiny.Vectors(count=24, batch_size=8),
        optimizer=restless,
        schedule=Constant(),
        budget=tiny.budget(epochs=4, eval_every=1),
    )
    run.fit(resume=False)
    values = {
        split: [row[run.task.metric] for row in tiny.rows(tmp_path) if row.get("split") == split]
        for split in ("valid", "test")
    }
    chosen = values["valid"].index(best(values["valid"]))
    assert chosen not in (0, len(values["valid"]) - 1, values["test"].index(best(values["test"])))
    for split, found in values.items():
        assert run.best[split][run.task.metric] == found[chosen]
        assert run.best[split]["step"] == chosen + 1 and run.best[split]["epoch"] == chosen // 3
        assert run.final[split][run.task.metric] == found[-1]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == chosen + 1
    assert checkpoint.load(tmp_path / "last.pt")["best"] == run.best


def test_the_fields_of_the_rows(tmp_path):
    run = tiny.trainer(tmp_path, rules=penalised(), budget=tiny.budget(log_every=2))
    run.fit(resume=False)
    solves = {"num_evals", "num_vjps", "residual", "num_steps", "converged", "diverged"}
    common = {"kind", "step", "epoch", "loss", "accuracy"} | solves
    with open(tmp_path / "metrics.jsonl") as log:
        rows = [json.loads(line) for line in log]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == [2, 3, 4, 6]  # every second step, and before every evaluation
    assert [row["epoch"] for row in train] == [0, 0, 1, 1]
    assert train[0].keys() == common | {"gradient_norm", "lr", "penalty", "peak_memory"}
    phases = {f"time/{name}" for name in ("solve", "attach", "backward", "optimizer", "step")}
    assert train[-1].keys() == train[0].keys() | phases | {"items_per_second"}  # once the warm-up of five steps is over
    assert all(row.keys() == common | {"split"} for row in rows if row["kind"] == "eval")
    assert len(rows) == 4 + 4


def test_a_row_covers_the_steps_since_the_last_one(tmp_path):
    runs = {every: tiny.trainer(tmp_path / str(every), budget=tiny.budget(log_every=every)) for every in (1, 3)}
    for run in runs.values():
        run.fit(resume=False)
    single, triple = ([row for row in tiny.rows(run.folder) if row["kind"] == "train"] for run in runs.values())
    assert len(single) == 6 and len(triple) == 2
    for i, row in enumerate(triple):
        part = single[3 * i : 3 * i + 3]
        for key in ("loss", "accuracy", "gradient_norm", "num_evals", "residual", "num_steps"):
            assert row[key] == pytest.approx(sum(other[key] for other in part) / 3), key
        assert row["lr"] == part[-1]["lr"]


def test_the_times_of_an_evaluation_are_not_those_of_the_next_step(tmp_path):
    seen = []

    class Watching(tiny.Vectors):
        def train(self, **options):
            for batches in super().train(**options):
                seen.append(len(run.timer.take_marks()))
                yield batches

    run = tiny.trainer(tmp_path, source=Watching(), budget=tiny.budget(eval_every=1))
    run.fit(resume=False)
    assert seen == [0] * 6


def test_of_equal_evaluations_the_first_is_the_best(tmp_path):
    model = tiny.Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = tiny.trainer(tmp_path, unwrapped=model, optimizer=optimizer, budget=tiny.budget(eval_every=1))
    run.fit(resume=False)
    assert run.best["valid"]["step"] == 1


def test_the_sums_of_a_window_keep_no_graph(tmp_path):
    run = tiny.trainer(tmp_path, budget=tiny.budget(epochs=1, log_every=100, eval_every=100))
    take, seen = run._take_step.reset_window, []
    run._take_step.reset_window = lambda: seen.append(run._take_step.window.tally) or take()
    run.fit(resume=False)
    assert seen and not any(tally.loss_sum.requires_grad for tally in seen)


def test_evaluation_waits_for_no_other_rank():
    """A split that the ranks do not divide evenly has fewer batches on some of them."""
    seen = []

    class Watching(ImageClassification):
        def score(self, model, batch, carry):
            seen.append(model.deq.group)
            return super().score(model, batch, carry)

    model = tiny.Classifier()
    model.deq.group = "world"
    options = {"shard": tiny.Shard(), "device": tiny.CPU, "precision": "fp32"}
    evaluate(model, Watching(), tiny.Vectors(), "test", **options)
    assert set(seen) == {None} and model.deq.group == "world"


@pytest.mark.parametrize(("times", "message"), [(0, "yields 0 steps where"), (2, "yields more steps where")])
def test_a_source_that_yields_another_number_of_steps_than_it_promises(tmp_path, times, message):
    """Such a run would end without an evaluation, or train past its epoch."""

    class Miscounting(tiny.Vectors):
        def train(self, **where):
            for _ in range(times):
                yield from super().train(**where)

    with pytest.raises(DataError, match=message):
        tiny.trainer(tmp_path, source=Miscounting(), budget=tiny.budget(epochs=3)).fit(resume=False)


def test_a_metric_that_is_no_number_at_first_is_not_the_best(tmp_path):
    class Late(ImageClassification):
        def report(self, tally):
            return {"loss": 0.0, "accuracy": nan if run.step <= 3 else 100.0 - run.step}

    run = tiny.trainer(tmp_path, task=Late(), budget=tiny.budget(epochs=3))
    run.fit(resume=False)
    assert run.best["valid"] == {**run.best["valid"], "epoch": 1, "accuracy": 94.0}


def test_a_source_without_a_step(tmp_path):
    class Empty(tiny.Vectors):
        def steps(self, epoch):
            return 0

    with pytest.raises(DataError, match=r"Empty\.steps promises 0 steps in 2 epochs: its training split is empty"):
        tiny.trainer(tmp_path, source=Empty())
