"""The lines of a figure are trained once, and kept by panel and line with the curve of the log."""

import json

import pytest

from phantom.engine.errors import ConfigError
from scripts import reproduce, studies
from scripts.running import lines, process
from scripts.running.stopping import Stop

FIGURE = {
    "title": "Two lengths",
    "metric": "accuracy",
    "split": "test",
    "overrides": ["epochs=2"],
    "panels": [{"name": "short", "overrides": ["data.length=8"]}, {"name": "long", "overrides": []}],
    "lines": [{"name": "Implicit", "experiment": "chains/implicit"}],
}


def run(folder, *overrides: str, panels=("short", "long"), again=False, figure=FIGURE) -> None:
    process.execute(lines.work(figure, folder, overrides, panels=panels, again=again), 1, Stop())


def test_what_the_panels_and_the_figure_need_cannot_be_changed(tmp_path):
    with pytest.raises(ConfigError, match=r"data.length=40 is what the panels differ in: .* of short, long"):
        run(tmp_path, "data.length=40")
    with pytest.raises(ConfigError, match=r"shows test, which eval_splits=\['train'\] must have"):
        run(tmp_path, "eval_splits=[train]")


@pytest.fixture
def jobs(monkeypatch):
    """Train nothing, and note what would be trained."""
    found, calls = [], {}

    def train(job, place, *, alone, gpus, stop):
        found.append((job, place.name))
        calls[place] = len(found)  # the next run may have begun when this one is kept
        return {key: None for key in lines.KEPT}

    monkeypatch.setattr(process, "train", train)
    monkeypatch.setattr(lines, "curve", lambda place, split, metric: ([0, 1], [float(calls[place]), 0.0]))
    return found


def test_runs_are_kept_by_panel_and_line(tmp_path, jobs):
    run(tmp_path)
    run(tmp_path, panels=["long"], again=True)
    run(tmp_path)
    assert [job for job, _ in jobs] == [
        ["experiment=chains/implicit", "epochs=2", "data.length=8"],
        ["experiment=chains/implicit", "epochs=2"],
        ["experiment=chains/implicit", "epochs=2"],
    ], "what has a curve is not trained again, unless asked for"
    assert jobs[0][1] == "seed42"
    recorded = json.loads((tmp_path / "curves.json").read_text())["runs"]
    assert [(item["panel"], item["values"][0]) for item in recorded] == [("short", 1.0), ("long", 3.0)]


def test_overrides_make_another_figure(tmp_path, jobs):
    run(tmp_path, "scale=smoke", panels=["short"])
    run(tmp_path, "epochs=5", "device=cpu", panels=["short"])
    assert {path.name for path in tmp_path.glob("*.json")} == {"curves@smoke.json", "curves@epochs=5.json"}
    assert jobs[1][0] == ["experiment=chains/implicit", "epochs=5", "data.length=8", "device=cpu"]
    with pytest.raises(ConfigError, match="experiment's seed"):
        run(tmp_path, "seed=3")


def test_the_curve_is_that_of_the_log(tmp_path):
    figure = FIGURE | {"lines": [{"name": "one step", "experiment": "chains/one_step"}]}
    run(tmp_path, "epochs=3", "wandb=disabled", f"runs={tmp_path / 'runs'}", panels=["short"], figure=figure)
    (first,) = studies.curves(tmp_path / "curves@epochs=3.json")
    assert first["epochs"] == [0, 1, 2] and first["steps"] == 3 and first["cpu_seconds"] > 0
    log = next((tmp_path / "runs").rglob("metrics.jsonl"))
    tested = [json.loads(row) for row in log.read_text().splitlines()]
    assert first["values"] == [row["accuracy"] for row in tested if row.get("split") == "test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a study"),
        (["chain"], "one of chains"),
        (["chains", "run"], "'run' is neither one of list, again"),
        (["chains", "panels=length 11"], "chains has no panel length 11; it has length 10, "),
        (["chains", "rows=two_steps"], "chains has no row two_steps; it has implicit, "),
        (["table1", "panels=length 10"], "table1 has no figure"),
    ],
)
def test_impossible_commands(arguments, message):
    with pytest.raises(SystemExit, match=message):
        reproduce.main(arguments)
