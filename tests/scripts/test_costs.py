"""What runs will cost: by records of the row, or of runs of its kind, or by the study; otherwise it is unknown."""

import json

import pytest

from scripts import studies
from scripts.running import costs
from scripts.running.process import Run

CHOICES = {"model": "m", "data": "d", "grad": "upg"}


def record(label: str, seconds: float, **changes) -> dict:
    return {"label": label, "scale": "cpu", "choices": CHOICES, "wall_seconds": seconds, "device": "card"} | changes


def run(label: str, grad: str = "upg") -> Run:
    return Run(f"{label}, seed 9", [], None, None, label=label, kind=("m", "d", grad, "cpu"))


@pytest.fixture
def keep(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)

    def write(name: str, content: dict) -> None:
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(content))

    return write


def test_the_median_of_the_row_comes_before_runs_of_its_kind(keep):
    for seed, seconds in enumerate((100, 140, 9000)):
        keep(f"seed{seed}", record("t/a@cpu", seconds))
    keep("other", record("t/b@cpu", 40))
    assert costs.told([run("t/a@cpu")] * 2, 1) == "About 5 min (2 by records on card)"
    # the median of 40, 100, 140 and 9,000 seconds
    assert costs.told([run("t/c@cpu")], 1) == "About 2 min (1 by records on card)"
    assert costs.told([run("t/a@cpu")] * 2, 2) == "About 5 min, 2 at a time: 2 min (2 by records on card)"


def test_another_scale_or_estimator_is_another_kind(keep):
    keep("seed0", record("t/a", 100, scale="paper"))
    keep("seed1", record("t/b@cpu", 100))
    runs = [run("t/a@cpu", grad="npg")]
    assert costs.told(runs, 1) == "No record says what 1 cost: t/a@cpu, seed 9"
    assert costs.told(runs, 1, 4000.0) == "About 67 min (1 by the study's estimate)"


def test_records_of_folds_and_of_figures_count(keep):
    keep("folds", {"folds": [], **record("t/a@cpu", 0), "cpu_seconds": {"mean": 50.0}, "wall_seconds": 500})
    keep("curves", {"runs": [{"label": "t/b@cpu", "scale": "cpu", "cpu_seconds": 30, "device": "card"}]})
    keep("something", {"title": "no run"})
    assert costs.told([run("t/a@cpu"), run("t/b@cpu")], 1) == "About 80 s (2 by records on card)"
