"""What lies in results/ is what the records render to, and the one writer of tables writes tables."""

import csv
import io
import json
import re

import pytest

from scripts import report, studies
from scripts.reporting import markdown, pages


@pytest.mark.parametrize("name", studies.names())
def test_the_pages_kept_are_those_of_the_records(name):
    found = pages.of(studies.load(name))
    assert found
    for path, text in (found | pages.sheets(studies.load(name))).items():
        assert path.read_text() == text, f"{path} is old: python scripts/report.py {name}"


def test_the_index_is_that_of_the_studies():
    text = (studies.results() / "README.md").read_text()
    assert text == pages.index()
    for name in studies.names():
        assert f"| {name} | {studies.load(name)['title']} |" in text


def test_every_page_belongs_to_a_study():
    rendered = {path for name in studies.names() for path in pages.of(studies.load(name))}
    by_hand = {studies.results() / name for name in ("README.md", "log.md")}
    assert {*studies.results().rglob("*.md")} == rendered | by_hand
    sheets = {path for name in studies.names() for path in pages.sheets(studies.load(name))}
    assert {*studies.results().rglob("*.csv"), *studies.results().rglob("*.tex")} == sheets
    pictures = [*studies.results().rglob("*.png"), *studies.results().rglob("*.pdf")]
    assert {path.with_suffix(".md") for path in pictures} <= rendered


@pytest.mark.parametrize("name", [name for name in studies.names() if name.startswith(("benchmark/", "explore"))])
def test_a_page_of_times_names_the_commit_of_its_record(name):
    folder, named = studies.results() / name, {}
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        about = record.get("about", record)
        commit = about["commit"][:8] + ("*" if about["dirty"] else "")
        text = path.with_suffix(".md").read_text()
        assert f"Commit {commit} (* marks uncommitted changes)" in text and record.get("note", "") in text, path
        named[path.stem] = commit
    if (folder / "summary.md").exists():
        text = (folder / "summary.md").read_text()
        said = re.search(r"Commit (.*) \(\* marks", text).group(1)
        # explorations whose estimators have other names are in no summary
        shown = {commit for stem, commit in named.items() if name != "explore" or f"[{stem}]" in text}
        assert {*said.split(", ")} == shown


def test_all_studies_are_rendered_in_their_places(tmp_path, monkeypatch, capsys):
    (tmp_path / "results" / "a" / "b").mkdir(parents=True)
    row = "{name: x, experiment: a/x, paper: '1.0'}"
    table = f"{{title: T, metric: accuracy, split: test, std: sample, rows: [{row}]}}"
    (tmp_path / "results" / "a" / "b" / "study.yaml").write_text(f"title: A study\ntables: {{one: {table}}}\n")
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    report.main([])
    assert capsys.readouterr().out.split() == ["results/a/b/one.md"]
    assert "| x | 1.0 | -- |" in (tmp_path / "results/a/b/one.md").read_text()
    index = (tmp_path / "results" / "README.md").read_text()
    assert "| a/b | A study | [one](a/b/one.md) | `python scripts/reproduce.py a/b` |" in index
    report.main(["a/b"])
    assert capsys.readouterr().out.startswith("# T\n")


@pytest.mark.parametrize("items", [[], ["a"], ["html", "out=page.html"]])
@pytest.mark.parametrize("text", ["", '{"label": "a/x", "best', "<<<<<<< HEAD\n{}\n"])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        (
            "tables: {o: {title: T, metric: m, split: t, std: sample, rows: [{name: x, experiment: a/x, paper: --}]}}",
            "x/seed0",
        ),
        ("explore: [one]", "one"),
        ("figure: {metric: m, split: t, panels: [], lines: []}", "curves"),
    ],
)
def test_a_damaged_record_is_named_in_a_sentence(items, text, part, name, tmp_path, monkeypatch):
    path = tmp_path / "results" / "a" / f"{name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (tmp_path / "results" / "a" / "study.yaml").write_text(f"title: A study\n{part}\n")
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: {re.escape(str(path))} is damaged .*: restore it"):
        report.main(items)


def test_an_exploration_that_was_not_measured_has_no_page(tmp_path, monkeypatch):
    (tmp_path / "results" / "a").mkdir(parents=True)
    (tmp_path / "results" / "a" / "study.yaml").write_text("title: A study\nexplore: [one]\n")
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    report.main(["a"])
    report.main(["html", f"out={tmp_path / 'page.html'}"])
    assert [path.name for path in (tmp_path / "results" / "a").iterdir()] == ["study.yaml"]


def test_a_table_is_written_as_markdown_reads_it():
    text = markdown.table(["", "n"], [["a", "1"], ["", ""]], "lr")
    assert text == "| | n |\n| --- | ---: |\n| a | 1 |\n|  |  |"
    assert markdown.page("# T", text) == f"# T\n\n{text}\n"
    with pytest.raises(ValueError, match="has 1 cells, the table has the columns a, b"):
        markdown.table(["a", "b"], [["x"]])


def test_a_page_writes_its_tables_as_csv_and_latex():
    one = markdown.table(["row", "n"], [["a | b", "1"], ["", ""]], "lr")
    two = markdown.table(["x"], [["**no**"], ["`k=3`"]])
    page = markdown.page("# T", one, "| and | no table |", two)
    assert "\n| a \\| b | 1 |\n" in page and "\n| **no** |\n" in page and page.tables == [one, two]
    files = page.files("t")
    assert set(files) == {"t.tex", "t-1.csv", "t-2.csv"}
    assert list(csv.reader(io.StringIO(files["t-1.csv"]))) == [["row", "n"], ["a | b", "1"], ["", ""]]
    assert files["t-2.csv"] == "x\nno\nk=3\n", "without the marks of Markdown"
    assert files["t.tex"].count(r"\begin{tabular}") == 2 and "{lr}\n" in files["t.tex"]
    assert set(markdown.page("# T", one).files("t")) == {"t.tex", "t.csv"} and markdown.page("# T").files("t") == {}


def test_latex_reads_every_cell_as_text():
    rows = [["85.0 ± 0.2", "-> \\ {}"], ["[0.5, 1]", "[2]"], ["*", ""]]
    table = markdown.Table(["50 %", "a_b & c"], rows, "lr")
    assert table.latex().splitlines() == [
        r"\begin{tabular}{lr}",
        r"50 \% & a\_b \& c \\",
        r"\hline",
        r"85.0 $\pm$ 0.2 & -$>$ \textbackslash{} \{\} \\",
        r"{[}0.5, 1] & [2] \\",  # or it is the argument of the line above
        r"{*} &  \\",
        r"\end{tabular}",
    ]
