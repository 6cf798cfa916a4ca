"""Training over supervision steps: shares add up, two processes equal one, resume is exact, evaluation sweeps."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate as evaluate_script
from phantom.engine.artifacts import checkpoint
from phantom.engine.build import build_model, build_source, build_trainer
from phantom.engine.source import Shard
from phantom.engine.tasks.base import Tally
from phantom.engine.tasks.puzzles import PuzzleSolving
from phantom.engine.training.evaluation import evaluate
from tests.engine import tiny
from tests.plans import plan

TINY = (
    "experiment=reasoners/sudoku4_upg",
    "model.d_model=8",
    "model.supervision.steps=3",
    "data.num_train=60",
    "data.num_test=21",
    "data.batch_size=8",
    "data.eval_batch_size=10",
    "data.passes=2",
    "schedule.warmup_steps=2",
    "log_every=1",
    "wandb=disabled",
    "progress=false",
    "device=cpu",
)
# rows halt at once and at random: the carries then hold rows of every age
RESTLESS = ("model.supervision.exploration=0.5", "model.start=random", "model.noise=0.05", "optimizer.lr=0.02")


def train(folder: Path, *overrides: str, stop: int | None = None):
    """Train; with `stop`, leave after that many steps, as if the process had ended there."""
    trainer = build_trainer(plan([*TINY, f"runs={folder}", *overrides]))
    trainer.folder.mkdir(parents=True, exist_ok=True)
    if any("exploration" in item for item in overrides):
        with torch.no_grad():  # halting outputs around zero from the first step on
            trainer.unwrapped.halting.bias.zero_()
            trainer.unwrapped.halting.weight.normal_(generator=torch.Generator().manual_seed(0))
    if stop is None:
        trainer.fit(resume=True)
        return trainer
    trainer.budget = replace(trainer.budget, checkpoint_every=stop)
    after = trainer._after_step

    def leave(*args, **kwargs):
        after(*args, **kwargs)
        if trainer.step == stop:
            raise KeyboardInterrupt

    trainer._after_step = leave
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(resume=False)
    return trainer


def rows_of(folder: Path) -> list[dict]:
    (log,) = folder.rglob("metrics.jsonl")
    return tiny.rows(log.parent)


def known(values):
    """Return nested values with None for NaN, which equals nothing: a rollout knows no residual."""
    if isinstance(values, dict):
        return {key: known(value) for key, value in values.items() if not str(key).startswith(tiny.TIMES)}
    return None if isinstance(values, float) and math.isnan(values) else values


def test_rates_are_over_puzzles_that_finish():
    numbers = {"finished": 4, "exact": 3, "right": 60, "cells": 64, "state_change": 0.2, "exact@2": 1}
    sums = {name: torch.tensor(float(value)) for name, value in numbers.items()}
    report = PuzzleSolving().report(Tally(torch.tensor(16.0), 8, sums))
    assert report == pytest.approx(
        {
            **{"loss": 2.0, "exact_match": 75.0, "cell_accuracy": 93.75, "finished": 0.5},
            **{"state_change": 0.05, "exact_match@2": 25.0},
        }
    )
    none = {name: torch.tensor(0.0) for name in ("finished", "exact", "right", "cells")}
    assert math.isnan(PuzzleSolving().report(Tally(torch.tensor(16.0), 8, none))["exact_match"])


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 1), (2, 2)])
def test_shares_of_the_rows_add_up_to_the_whole(world, micro):
    """Each share keeps rows of its own, over more steps than a puzzle has."""
    made = plan([*TINY, "model.supervision.exploration=0.0"])
    source = build_source(made)

    def run(*shards: Shard) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(0)
        model, total = build_model(made, source.spec).double().train(), 0.0
        for shard in shards:
            carries = [None] * shard.micro
            for _, micro_batches in zip(range(5), source.train(epoch=0, start=0, shard=shard), strict=False):
                for i, batch in enumerate(micro_batches):
                    score = PuzzleSolving().score(model, batch, carries[i])
                    carries[i] = score.carry
                    score.tally.loss_sum.backward()
                    total += score.tally.loss_sum.item()
        return total, [p.grad for p in model.parameters()]

    whole, gradients = run(Shard())
    shared, added = run(*(Shard(rank=rank, world=world, micro=micro) for rank in range(world)))
    assert shared == pytest.approx(whole, rel=1e-10)
    for a, b in zip(added, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.slow  # test_ranks_agree.py has both models in every suite
def test_two_processes_equal_one(tmp_path):
    options = ("steps=4", "model.supervision.exploration=0.0", "ema=null")
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*launch, str(root / "train.py"), *TINY, *options, f"runs={tmp_path / 'two'}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    trainer = build_trainer(plan([*TINY, *options, f"runs={tmp_path / 'one'}"]))
    trainer.folder.mkdir(parents=True)
    trainer.fit(resume=False)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3, 4, 4]
    for a, b in zip(one, two, strict=True):
        # untrained, the cycle expands the rounding of float32; in float64 they agree, see test_ranks_agree.py
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert (b["exact_match"], b["finished"]) == (a["exact_match"], a["finished"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact_with_rows_of_every_age(tmp_path, accumulate):
    options = (*RESTLESS, "steps=8", f"accumulate={accumulate}")
    whole = train(tmp_path / "whole", *options)
    stopped = train(tmp_path / "parts", *options, stop=5)
    ages = torch.cat([carry["steps"] for carry in stopped._take_step.carries])
    assert len(set(ages.tolist())) > 1, "the rows have different ages"
    resumed = train(tmp_path / "parts", *options)
    found, expected = (checkpoint.load(each.folder / "last.pt") for each in (resumed, whole))
    assert len(expected["ranks"][0]["carries"]) == accumulate
    for key in expected.keys() - {"config", *tiny.CLOCKED}:
        assert tiny.same(known(found[key]), known(expected[key])), key
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")


def test_evaluation_sweeps(tmp_path, capsys):
    trainer = train(tmp_path, *RESTLESS, "steps=4")
    capsys.readouterr()
    sweep = ["model.supervision.eval_steps=3,6", "model.supervision.restarts=1,2", "eval_solver.max_steps=3"]
    evaluate_script.main([f"run={trainer.folder}", *sweep])
    rows = json.loads(capsys.readouterr().out)
    assert [row["overrides"][:2] for row in rows] == [
        [f"model.supervision.eval_steps={steps}", f"model.supervision.restarts={starts}"]
        for steps in (3, 6)
        for starts in (1, 2)
    ]
    own = trainer.final["test"]
    assert {name: rows[0][name] for name in own} == known(own)
    assert [row["num_evals"] for row in rows] == [9, 18, 18, 36], "those of every start"
    assert "exact_match@6" in rows[2] and "exact_match_any" in rows[1] and "exact_match_any" not in rows[0]
    assert rows[2]["exact_match@2"] == rows[0]["exact_match@2"]


def test_evaluation_by_a_solver_that_measures_residuals(tmp_path, capsys):
    trainer, solver = train(tmp_path, "steps=2"), "phantom.FixedPoint"
    capsys.readouterr()
    evaluate_script.main([f"run={trainer.folder}", f"eval_solver={{_target_:{solver},max_steps:5,tol:null}}"])
    row = json.loads(capsys.readouterr().out)
    assert row["residual"] > 0 and row["state_change"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.clues=[9,3]",), r"clues=\[9, 3\] must be the least and the greatest number of given cells"),
        (("data=maze", "data.size=40"), "size=40 must be an integer from 8 to 30"),
        (("data=sudoku_files", "data.root=/nowhere"), "there is no file /nowhere/train.csv"),
        (("model.cell.num_fast=0",), "num_fast=0 must be an integer >= 1"),
        (("model.cell.nonsense=1",), "nonsense"),
        (("data=digits",), "the model serves puzzle_solving, the data is image_classification"),
        (
            ("grad=implicit", "adjoint_solver=rollout", "adjoint_solver.tol=null"),
            "measures no residual: the adjoint solve needs one",
        ),
        (("solver=rollout", "solver.tol=0.1"), r"tol=0\.1 must be None \(null in YAML\)"),
        (("course=warm_up_k", "grad=bptt"), r"course\.k needs an estimator with k, BPTT has none"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(plan([*TINY[:1], f"runs={tmp_path}", "wandb=disabled", *overrides]))


@pytest.mark.parametrize("leaf", ["reasoner_trm", "reasoner_trm_attention", "reasoner_hrm", "reasoner_eqr"])
def test_the_published_models_train_and_evaluate_alike_twice(tmp_path, leaf):
    small = ["model.d_model=16", "model.cell.stack.num_layers=1", "model.cell.stack.block.multiple=8"]
    trainer = train(tmp_path, f"model={leaf}", *small, "ema=null", "steps=4", "eval_every=2")
    before, after = (row["loss"] for row in rows_of(tmp_path) if row["kind"] == "eval")
    assert after != before
    again = evaluate(
        trainer.unwrapped, trainer.task, trainer.source, "test", shard=Shard(), device=tiny.CPU, precision="fp32"
    )
    assert again["loss"] == after
    if leaf == "reasoner_hrm":  # two cycles and a pair, and three more cycles that no gradient sees
        assert [row["num_evals"] for row in rows_of(tmp_path) if row["kind"] == "train"] == [3] * 4


def test_cycles_that_only_training_has_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    alike = [f"runs={tmp_path}", "solver=rollout", "solver.max_steps=2"]
    build_trainer(plan([*TINY, *alike, "eval_solver=rollout", "eval_solver.max_steps=3"]))
    assert "rollout: training runs" not in caplog.text
    build_trainer(plan([*TINY, *alike, "eval_solver=null"]))
    assert (
        "rollout: training runs solver.max_steps=2 steps and those of UPG, evaluation the former alone" in caplog.text
    )
    for grad in (["grad=upg", "k=1", "lam=1"], ["grad=bptt"]):
        caplog.clear()
        build_trainer(plan([*TINY, *alike, "eval_solver=null", *grad, "course=random_depth"]))
        assert "rollout: training runs the steps of course.depth, evaluation solver.max_steps=2;" in caplog.text
