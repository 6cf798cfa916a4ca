"""The pages of every study, and the index of all: text from records, and from nothing else."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from scripts import studies
from scripts.reporting import benchmarks, explore, figures, markdown, suites, sweeps, tables, targets
from scripts.reporting.grids.runs import Runs, runs_of

# of these the tables are kept as CSV and LaTeX, too
SHEETS = ("tables", "figure", "grids", "measures")


def of(study: dict[str, Any]) -> dict[Path, markdown.Page]:
    """Return every page of a study that has something to show, by the path it is kept at.

    Raises:
        StudyError: its definition lacks what a page needs, or a record is damaged.
    """
    studies.check_shown(study)
    folder, found = study["folder"], {}
    for name, table in study.get("tables", {}).items():
        found[folder / f"{name}.md"] = (targets if "target" in table else tables).render(table)
    if "figure" in study:
        entries = studies.curves(folder / "curves.json")
        found[folder / "curves.md"] = figures.table(study["figure"], entries)
    for name, drawing, grid, runs in _grids(study):
        found[folder / f"{name}.md"] = drawing.page(grid, runs)
    if "benchmark" in study:
        rows = study["benchmark"]["rows"]
        results = {row["name"]: _read(folder / f"{row['name']}.json") for row in rows}
        shown = [(row, results[row["name"]]) for row in rows if results[row["name"]] is not None]
        found |= {folder / f"{row['name']}.md": benchmarks.render(result) for row, result in shown}
        if shown:
            parts = [(row["title"], row.get("paper", ""), result) for row, result in shown]
            found[folder / "summary.md"] = suites.render(study["title"], parts)
    for name, drawing, record in _measured(study):
        found[folder / f"{name}.md"] = drawing.page(record)
    explored = dict(_explored(study))
    found |= {folder / f"{name}.md": explore.render(record) for name, record in explored.items()}
    alike = {name: record for name, record in explored.items() if explore.is_labelled(record)}
    if len(alike) > 1:
        found[folder / "summary.md"] = explore.summary(study["title"], alike)
    return found


def sheets(study: dict[str, Any]) -> dict[Path, str]:
    """Return the tables of a study's pages as CSV and LaTeX, by the path they are kept at."""
    if not any(part in study for part in SHEETS):
        return {}
    return {
        path.with_name(name): text for path, page in of(study).items() for name, text in page.files(path.stem).items()
    }


def write(study: dict[str, Any]) -> dict[Path, markdown.Page]:
    """Write the pages of a study with their tables, and its figures once there is something to draw; return the pages.

    A figure is a PNG and a PDF.
    """
    found = of(study)
    for path, text in (found | sheets(study)).items():
        path.write_text(text, "utf-8")
    if "figure" in study:
        entries = studies.curves(study["folder"] / "curves.json")
        if entries:
            figures.draw(study["figure"], entries, study["folder"] / "curves.png")
    for name, record in _explored(study):
        explore.draw(record, study["folder"] / f"{name}.png")
    for name, drawing, grid, runs in _grids(study):
        if runs.found:
            drawing.draw(grid, runs, study["folder"] / f"{name}.png")
    for name, drawing, record in _measured(study):
        drawing.draw(record, study["folder"] / f"{name}.png")
    return found


def write_benchmark(path: Path) -> str:
    """Write the page of a benchmark's result beside it, and return it."""
    return _beside(path, benchmarks.render(_read(path)))


def write_explored(path: Path) -> str:
    """Write the page and the figure of an exploration beside it, and return the page."""
    result = _read(path)
    text = _beside(path, explore.render(result))
    explore.draw(result, path.with_suffix(".png"))
    return text


def write_sweep(folder: Path) -> str:
    """Write the page of a sweep into its folder, with its table as CSV and LaTeX and its maps; return the page.

    Raises:
        ValueError: what lies there is no sweep.
    """
    content = sweeps.read(folder / "sweep.json")
    page = sweeps.page(content)
    for name, part in {"sweep.md": page, **page.files("sweep")}.items():
        _own(folder / name).write_text(part, "utf-8")
    if sweeps.drawn(content):
        _own(folder / "sweep.pdf")
        sweeps.draw(content, _own(folder / "sweep.png"))
    return page


def _own(path: Path) -> Path:
    """Return a path to write to, where no link leads to another file: a folder may be from elsewhere."""
    if path.is_symlink():
        path.unlink()
    return path


def write_index() -> None:
    """Write results/README.md."""
    (studies.results() / "README.md").write_text(index(), "utf-8")


def index() -> str:
    """Return the list of all studies, with their pages and the commands that fill them."""
    rows = []
    for study in map(studies.load, studies.names()):
        files = [f"[{path.stem}]({path.relative_to(studies.results()).as_posix()})" for path in _front(study)]
        rows.append([study["name"], study["title"], ", ".join(files), f"`{command(study)}`"])
    return markdown.page(
        "# Results",
        "A folder with a `study.yaml` is a study: its definition, its records (`.json`), and its pages, which "
        "`python scripts/report.py [study ...]` renders from the records and from nothing else, this one included. "
        "The last column runs what a study lacks. What was learnt on the way is in [log.md](log.md).",
        markdown.table(["study", "", "pages", "command"], rows),
    )


def _front(study: dict[str, Any]) -> list[Path]:
    """Return the pages of a study that stand for the rest."""
    pages = list(of(study))
    return [path for path in pages if path.stem == "summary"] or pages


def command(study: dict[str, Any]) -> str:
    """Return the command that runs what a study lacks."""
    if "benchmark" in study:
        return f"python scripts/benchmark.py suite {study['name'].removeprefix('benchmark/')}"
    if "explore" in study:
        return f"python scripts/explore.py run=<folder> out={study['folder'].relative_to(studies.ROOT)}/<name>.json"
    return f"python scripts/reproduce.py {study['name']}"


def _grids(study: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any], Runs]]:
    """Return (name, module that draws it, grid, its runs) of the grids of a study."""
    grids = study.get("grids", {}).items()
    return [
        (name, import_module(f"scripts.reporting.grids.{grid['function']}"), grid, runs_of(grid))
        for name, grid in grids
    ]


def _measured(study: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Return (name, module that draws it, record) of the measures that have a record at the paper's scale."""
    found = [
        (name, part["function"], _read(study["folder"] / f"{name}.json"))
        for name, part in study.get("measures", {}).items()
    ]
    return [
        (name, import_module(f"scripts.reporting.measures.{function}"), record)
        for name, function, record in found
        if record is not None
    ]


def _explored(study: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, record) of the explorations of a study that have been measured."""
    found = [(name, _read(study["folder"] / f"{name}.json")) for name in study.get("explore", [])]
    return [(name, record) for name, record in found if record is not None]


def _beside(path: Path, text: str) -> str:
    path.with_suffix(".md").write_text(text, "utf-8")
    return text


def _read(path: Path) -> Any:
    return studies.record(path) if path.exists() else None
