"""Render the pages of studies from their records, and from nothing else.

    python scripts/report.py                  # every page of results/, and its index results/README.md
    python scripts/report.py table1 chains    # these studies, and print their pages
    python scripts/report.py html             # all of it as one page, with charts and filters: report.html
    python scripts/report.py html runs=runs out=page.html     # and the run folders below runs/, with their curves
    python scripts/report.py sweep=<folder>   # a sweep of train.py -m, which names its folder when it ends

A study is a folder of results/ with a study.yaml; see scripts/studies.py. A cell of a table is mean ± std (n), a
smaller budget is labelled, and a row without a record prints --. A figure is drawn once it has a curve. Tables are
Markdown, CSV and LaTeX, figures PNG and PDF. This needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from scripts import arguments, studies
    from scripts.reporting import pages
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")


def main(items: Sequence[str]) -> None:
    """Render a sweep, the named studies, or all of them."""
    try:
        _render(items)
    except studies.StudyError as error:
        arguments.fail(str(error))


def _render(items: Sequence[str]) -> None:
    known = studies.names()
    own, names, others = arguments.split(items, doc=__doc__, own=("sweep", "runs", "out"), words=("html", *known))
    if "html" in names:
        _write_html(
            own, [*others, *(f"{key}={own[key]}" for key in own if key == "sweep"), *sorted({*names} - {"html"})]
        )
        return
    wrong = [*others, *(f"{key}={own[key]}" for key in ("runs", "out") if key in own)]
    if wrong:
        arguments.fail(f"{wrong[0]} is not known here; runs=<folder> and out=<file> go with `html`, see --help")
    if "sweep" in own:
        _write_sweep(Path(own["sweep"]))
        if not names:
            return
    for study in map(studies.load, names or known):
        for path, text in pages.write(study).items():
            print(text if names else path.relative_to(studies.ROOT))
        if "figure" in study and not (study["folder"] / "curves.json").exists():
            print(f"{study['name']} has no curve to draw yet: python scripts/reproduce.py {study['name']}")
    pages.write_index()


def _write_sweep(folder: Path) -> None:
    if not (folder / "sweep.json").is_file():
        arguments.fail(f"sweep={folder} holds no sweep.json; train.py -m names the folder when it ends")
    try:
        print(pages.write_sweep(folder))
    except ValueError as error:
        arguments.fail(str(error))


def _write_html(own: dict[str, str], wrong: Sequence[str]) -> None:
    try:
        from scripts.reporting.html import page
    except ModuleNotFoundError as error:
        arguments.fail(f"{error}: the page needs `pip install -e '.[report]'`, or bash scripts/setup.sh")
    runs, path = Path(own["runs"]) if "runs" in own else None, Path(own.get("out", page.DEFAULT))
    if runs is not None and not runs.is_dir():
        wrong = [*wrong, f"runs={runs}, which is no folder"]
    if path.is_dir():
        wrong = [*wrong, f"out={own['out']}, which is a folder" if own["out"] else "out= without a name"]
    if wrong:
        arguments.fail(f"html has runs=<folder> and out=<file>, not {wrong[0]}")
    try:
        page.write(path, runs)
    except OSError as error:
        arguments.fail(f"out={path} cannot be written: {error.strerror}")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
