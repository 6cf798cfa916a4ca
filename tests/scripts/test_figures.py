"""Figures: what is drawn is what was recorded."""

from scripts import report, studies
from scripts.reporting import figures

FIGURE = {
    "title": "Two lengths",
    "metric": "accuracy",
    "split": "test",
    "overrides": [],
    "panels": [{"name": "short", "overrides": []}, {"name": "long", "overrides": []}],
    "lines": [{"name": "Implicit", "experiment": "a"}, {"name": "UPG", "experiment": "b"}],
}


def entry(panel: str, line: str, values: list[float], commit: str = "0123456789") -> dict:
    curve = {"epochs": list(range(len(values))), "values": values}
    return {"panel": panel, "line": line, **curve, "commit": commit, "dirty": commit == "abc"}


def test_the_table_shows_last_and_best_and_what_was_not_run():
    entries = [entry("long", "UPG", [50.0, 70.0, 70.0, 60.0]), entry("short", "Implicit", [100.0], commit="abc")]
    rows = figures.table(FIGURE, entries).splitlines()
    assert "| Implicit | 100.0 (100.0, 0) | -- |" in rows
    assert "| UPG | -- | 60.0 (70.0, 1) |" in rows
    assert any(row.startswith("Commit 01234567, abc* (* marks uncommitted changes). The curves") for row in rows)
    entries = [
        item | {"precision": name, "gradient_precision": None}
        for item, name in zip(entries, ("fp32", "bf16"), strict=True)
    ]
    assert " Precision bf16, fp32. " in figures.table(FIGURE, entries)


def test_a_value_that_was_not_finite():
    rows = figures.table(FIGURE, [entry("long", "UPG", [None, 9.0, None]), entry("short", "UPG", [None])])
    assert "| UPG | not finite | not finite (9.0, 1) |" in rows.splitlines()


def test_the_lines_drawn_are_the_values_recorded(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda canvas, path, **_: drawn.append((canvas, path)))
    entries = [entry("long", "UPG", [1.0, 3.0]), entry("short", "UPG", [2.0]), entry("short", "Implicit", [4.0, 5.0])]
    figures.draw(FIGURE, entries, tmp_path / "curves.png")
    (canvas, path), (_, other) = drawn
    assert other == tmp_path / "curves.pdf"
    lines = {(axis.get_title(), line.get_label()): line for axis in canvas.axes for line in axis.get_lines()}
    assert {key: line.get_ydata().tolist() for key, line in lines.items()} == {
        (item["panel"], item["line"]): item["values"] for item in entries
    }
    assert (
        lines["long", "UPG"].get_color() == lines["short", "UPG"].get_color() != lines["short", "Implicit"].get_color()
    )
    assert path == tmp_path / "curves.png"


def test_nothing_to_draw(tmp_path, monkeypatch, capsys):
    (tmp_path / "results" / "lengths").mkdir(parents=True)
    (tmp_path / "results" / "lengths" / "study.yaml").write_text(f"title: Lengths\nfigure: {FIGURE}\n")
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    report.main(["lengths"])
    assert "lengths has no curve to draw yet: python scripts/reproduce.py lengths" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "results" / "lengths").iterdir()}
    assert written == {"study.yaml", "curves.md", "curves.csv", "curves.tex"}
    assert "| UPG | -- | -- |" in (tmp_path / "results" / "lengths" / "curves.md").read_text()
