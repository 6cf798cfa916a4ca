"""The table of a speedrun says how long runs trained until they reached the target, and which did not."""

import pytest

from phantom.engine.artifacts import records
from phantom.engine.build import build_trainer
from phantom.engine.run import run
from scripts import report, studies
from scripts.reporting import targets
from tests.configs.tiny_data import tiny
from tests.plans import plan

TABLE = {"title": "T", "metric": "accuracy", "split": "test", "std": "sample", "target": 80.0}


def record(seed: int, seconds: float, *, reached: bool = True, **changes) -> dict:
    accuracy = 80.5 + seed if reached else 79.0
    return {
        "best": {"test": {"accuracy": accuracy}},
        **{"seed": seed, "target": 80.0, "reached": reached, "training_seconds": seconds, "wall_seconds": 2 * seconds},
        **{"steps": 100 * (seed + 1), "overrides": ["experiment=t/a", "k=3"], "world_size": 1, "device": "card"},
        **{"precision": "tf32", "gradient_precision": "bf16", "commit": "abcdef0123", "dirty": False},
        "choices": {"data": "digits"},
    } | changes


def row(tmp_path, monkeypatch, *found: dict, name: str = "t/a") -> dict[str, str]:
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    for content in found:
        records.write_json(tmp_path / "results" / name / f"seed{content['seed']}.json", content)
    text = targets.render(TABLE | {"rows": [{"name": "a", "experiment": "t/a", "paper": "--"}]})
    heads, _, cells = (
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    )
    return dict(zip(heads, cells, strict=True))


def test_mean_best_and_how_many(tmp_path, monkeypatch):
    found = [record(0, 30.0), record(1, 20.0), record(2, 1.0, reached=False), record(3, 0.1, target=10.0)]
    assert row(tmp_path, monkeypatch, *found) == {
        "row": "a",
        "reached": "2 of 3",
        "seconds": "25.00 ± 7.07 (2)",
        "best": "20.00",
        "record of the best": "t/a, seed 1",
        "steps": "100 to 200",
        "accuracy then": "80.50 to 81.50",
        "with evaluations, s": "40 to 60",
        "card": "1 x card",
        "precision": "tf32 (gradient part bf16)",
        "budget": "paper, 300 steps at most",
        "commit": "abcdef01",
        "command": "`python train.py experiment=t/a k=3 seed=1`",
    }


def test_runs_that_all_got_there_do_not_tell_the_steps_of_their_budget(tmp_path, monkeypatch):
    assert row(tmp_path, monkeypatch, record(0, 30.0), record(1, 20.0))["budget"] == "paper"


def test_what_was_not_reached_has_no_seconds(tmp_path, monkeypatch):
    found = row(tmp_path, monkeypatch, record(0, 30.0, reached=False), name="t/a@smoke")
    assert found["reached"] == "0 of 1 [smoke, digits]"
    assert {found[key] for key in ("seconds", "best", "record of the best", "steps", "accuracy then")} == {"--"}
    assert set(row(tmp_path / "empty", monkeypatch).values()) == {"a", "--"}


@pytest.mark.parametrize("name", ["flips_24", "table1_upg"])
def test_rows_of_the_study_stop_at_its_target(name, tmp_path, monkeypatch):
    """Rehearsed with a low target: one image of the ten is enough."""
    target = studies.load("speedrun")["tables"]["target"]["target"]
    made = plan([f"experiment=speedrun/{name}"])
    assert made.budget.target == target == 85.8
    assert made.choices["model"] == "mdeq_tiny" and made.choices["data"] == "cifar10"
    (tmp_path / "data").mkdir()
    small = [*tiny("cifar10", tmp_path / "data"), "epochs=2", "solver.max_steps=2", "k=1", "wandb=disabled"]
    made = plan([f"experiment=speedrun/{name}", "target=10", *small, f"runs={tmp_path}"])
    found = run(build_trainer(made), made)
    assert found["reached"] and found["target"] == 10 and found["steps"] == 5
    assert found["training_seconds"] > 0


def test_the_page_is_one_of_the_report(capsys):
    report.main(["speedrun"])
    assert "| Crops and flips, 24 epochs, 12 solver steps | " in capsys.readouterr().out
