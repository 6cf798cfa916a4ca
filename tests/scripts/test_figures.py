"""Figures: runs are trained once and kept by panel and line, and what is drawn is what was recorded."""

import json

import pytest

from scripts import figures

FIGURE = {
    "title": "Two lengths",
    "metric": "accuracy",
    "split": "test",
    "overrides": [],
    "panels": [{"name": "short", "overrides": []}, {"name": "long", "overrides": []}],
    "lines": [{"name": "Implicit", "experiment": "a"}, {"name": "UPG", "experiment": "b"}],
}


def entry(panel: str, line: str, values: list[float], commit: str = "0123456789") -> dict:
    return {"panel": panel, "line": line, "epochs": list(range(len(values))), "values": values, "commit": commit}


def test_the_table_shows_last_and_best_and_what_was_not_run():
    entries = [entry("long", "UPG", [50.0, 70.0, 70.0, 60.0]), entry("short", "Implicit", [100.0], commit="abc")]
    rows = figures.table(FIGURE, entries).splitlines()
    assert "| Implicit | 100.0 (100.0, 0) | -- |" in rows
    assert "| UPG | -- | 60.0 (70.0, 1) |" in rows
    assert any(row.startswith("Commit 01234567, abc.") for row in rows)


def test_the_lines_drawn_are_the_values_recorded(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda canvas, path, dpi: drawn.append((canvas, path)))
    entries = [entry("long", "UPG", [1.0, 3.0]), entry("short", "UPG", [2.0]), entry("short", "Implicit", [4.0, 5.0])]
    figures.draw(FIGURE, entries, tmp_path)
    ((canvas, path),) = drawn
    lines = {(axis.get_title(), line.get_label()): line for axis in canvas.axes for line in axis.get_lines()}
    assert {key: line.get_ydata().tolist() for key, line in lines.items()} == {
        (item["panel"], item["line"]): item["values"] for item in entries
    }
    assert (
        lines["long", "UPG"].get_color() == lines["short", "UPG"].get_color() != lines["short", "Implicit"].get_color()
    )
    assert path == tmp_path / "curves.png"


def test_runs_are_kept_by_panel_and_line(tmp_path, monkeypatch):
    jobs = []

    def train(job, place):
        jobs.append((job, place.name))
        return {key: None for key in figures.KEPT}

    monkeypatch.setattr(figures.training, "train", train)
    monkeypatch.setattr(figures.training, "curve", lambda place, split, metric: ([0, 1], [float(len(jobs)), 0.0]))
    figure = FIGURE | {
        "overrides": ["epochs=2"],
        "panels": [{"name": "short", "overrides": ["data.length=8"]}, {"name": "long", "overrides": []}],
        "lines": [{"name": "Implicit", "experiment": "chains/implicit"}],
    }
    figures.run(figure, ["short", "long"], tmp_path)
    figures.run(figure, ["long"], tmp_path)
    assert [job for job, _ in jobs] == [
        ["experiment=chains/implicit", "epochs=2", "data.length=8"],
        ["experiment=chains/implicit", "epochs=2"],
        ["experiment=chains/implicit", "epochs=2"],
    ]
    assert jobs[0][1] == "seed42"
    recorded = json.loads((tmp_path / "curves.json").read_text())["runs"]
    assert [(item["panel"], item["values"][0]) for item in recorded] == [("short", 1.0), ("long", 3.0)]


def test_the_curve_is_that_of_the_log(tmp_path):
    figure = FIGURE | {
        "overrides": ["epochs=3", "data.length=8", "wandb=disabled", f"runs={tmp_path / 'runs'}"],
        "lines": [{"name": "one step", "experiment": "chains/one_step"}],
    }
    figures.run(figure, ["short"], tmp_path)
    (first,) = figures.entries_of(tmp_path)
    assert first["epochs"] == [0, 1, 2] and first["steps"] == 3 and first["cpu_seconds"] > 0
    log = next((tmp_path / "runs").rglob("metrics.jsonl"))
    tested = [json.loads(row) for row in log.read_text().splitlines()]
    assert first["values"] == [row["accuracy"] for row in tested if row.get("split") == "test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a figure"),
        (["chains"], "then run or draw"),
        (["chain", "run"], "one of chains"),
        (["chains", "run", "panels=length 11"], "length 11: allowed"),
        (["chains", "draw", "panels=length 10"], "allowed is run"),
    ],
)
def test_impossible_commands(arguments, message):
    with pytest.raises(SystemExit, match=message):
        figures.main(arguments)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(SystemExit, match="holds no run"):
        figures.draw(FIGURE, [], tmp_path)
