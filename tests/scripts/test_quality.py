"""The comparison of estimators: costs are those of their definitions, and a long backward solve is the reference."""

import itertools
import json

import pytest

from phantom.engine.build import build_trainer
from scripts import quality
from tests.plans import plan


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    job = [
        *("steps=1", "subset=8", "test_subset=4", "data.batch_size=8", "solver.max_steps=12", "wandb=disabled"),
        *("model.channels=[8,8]", "model.head_channels=[2,2]", "model.final_channels=8", "progress=false"),
        f"runs={folder}",
    ]
    trainer = build_trainer(plan(job))
    trainer.fit(resume=False)
    out = folder / "quality.json"
    quality.main([f"run={trainer.folder}", "images=3", f"out={out}"])
    return json.loads(out.read_text()) | {"text": out.with_suffix(".md").read_text()}


def test_costs(result):
    rows = {row["estimator"]: row for row in result["rows"]}
    assert (rows["one step"]["graph_evals"], rows["one step"]["vjps"]) == (1, 0)
    assert (rows["SHINE"]["graph_evals"], rows["SHINE"]["vjps"]) == (1, 0)
    assert (rows["UPG k=5 lam=0.5"]["graph_evals"], rows["UPG k=5 lam=0.5"]["vjps"]) == (5, 0)
    assert (rows["NPG k=5 lam=0.5"]["graph_evals"], rows["NPG k=5 lam=0.5"]["vjps"]) == (1, 4)
    assert rows["implicit, 10 Broyden steps"]["vjps"] == 10
    assert all(row["seconds"] > 0 for row in rows.values())


def test_quality(result):
    rows = {row["estimator"]: row for row in result["rows"]}
    assert result["reference"]["adjoint_residual"] < 1e-4
    steps = [rows[f"implicit, {steps} Broyden steps"] for steps in (5, 10, 22)]
    assert steps[0]["cosine"] < steps[1]["cosine"] < steps[2]["cosine"] and steps[2]["cosine"] > 0.8
    assert steps[2]["adjoint_residual"] < steps[0]["adjoint_residual"]
    assert all(-1 <= row["cosine"] <= 1 + 1e-6 for row in rows.values())
    for row in result["rows"]:
        assert f"| {row['estimator']} |" in result["text"]


def test_solvers(result):
    curves = {row["solver"]: list(row["residual"].values()) for row in result["solvers"]}
    assert set(curves) >= {"Broyden", "Anderson, memory 6", "fixed point, lam=0.5"}
    for values in curves.values():
        assert all(a >= b > 0 for a, b in itertools.pairwise(values)), "the best iterate never gets worse"


def test_a_folder_is_needed(tmp_path):
    with pytest.raises(SystemExit, match="run=<folder>"):
        quality.main(["images=3"])
    with pytest.raises(SystemExit, match="no run folder"):
        quality.main([f"run={tmp_path / 'none'}"])
