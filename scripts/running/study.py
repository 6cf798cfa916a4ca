"""What a study lacks: its rows, lines and folds as runs of train.py, and its measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scripts import arguments
from scripts.running import folds, lines, measuring, seeds
from scripts.running.process import Work


def rows_of(study: dict[str, Any]) -> dict[str, str]:
    """Return the experiments of a study's rows and lines, and its measures, by the names that `rows=` takes."""
    parts = [*study.get("tables", {}).values(), *([study["figure"]] if "figure" in study else [])]
    found = [row["experiment"] for part in parts for row in part.get("rows", part.get("lines"))]
    return {experiment.split("/", 1)[1]: experiment for experiment in found} | {
        name: name for name in study.get("measures", ())
    }


def works(study: dict[str, Any], own: dict[str, str], overrides: Sequence[str], *, again: bool) -> list[Work]:
    """Return the work of a study that is not done, or all of it.

    Args:
        own: may have rows=, panels=, folds= and jobs=; the first three are comma-separated.

    Raises:
        ConfigError: the overrides do not compose with one of the rows.
    """
    parts = study.get("tables", {}).values()
    if "panels" in own and "figure" not in study:
        arguments.fail(f"{study['name']} has no figure: leave panels= out")
    if "folds" in own and not any("protocols" in table for table in parts):
        arguments.fail(f"{study['name']} has no folds: leave folds= out")
    if "measures" in study and "jobs" in own:
        arguments.fail(f"{study['name']} measures one thing after the other, on one thread: leave jobs= out")
    named = rows_of(study)
    wanted = [named[name] for name in arguments.some(own, "rows", list(named), study["name"])]
    found = []
    for table in parts:
        own_rows = {row["experiment"] for row in table["rows"]}
        experiments = [experiment for experiment in wanted if experiment in own_rows]
        if "protocols" in table:
            # some of the folds alone leave no record that could be missing
            every = again or "folds" in own
            found += [_lacking(folds.work(experiment, overrides, _folds(own)), every) for experiment in experiments]
        elif "folds" not in own:
            found.append(_lacking(seeds.work(experiments, overrides), again))
    if "figure" in study:
        figure = study["figure"] | {
            "lines": [line for name in wanted for line in study["figure"]["lines"] if line["experiment"] == name]
        }
        panels = arguments.some(own, "panels", [panel["name"] for panel in figure["panels"]], study["name"])
        found.append(lines.work(figure, study["folder"], overrides, panels=panels, again=again))
    if "measures" in study:
        found.append(measuring.work(study, wanted, overrides, again=again))
    return [work for work in found if work.runs]


def _lacking(work: Work, again: bool) -> Work:
    return work if again else replace(work, runs=[run for run in work.runs if not run.kept.exists()])


def _folds(own: dict[str, str]) -> list[int]:
    every = [str(fold) for fold in range(folds.NUM_FOLDS)]
    return [int(fold) for fold in arguments.some(own, "folds", every, "a row")]
