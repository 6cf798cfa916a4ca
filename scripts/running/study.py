"""What a study lacks: its rows, points, lines and folds as runs of train.py, and its measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from phantom.engine.config.overrides import parse
from phantom.engine.errors import ConfigError
from scripts import arguments, studies
from scripts.running import costs, folds, lines, measuring, rehearsal, seeds
from scripts.running.process import Work, at_a_time, plan
from scripts.running.seeds import Row
from scripts.studies import Point

# scales whose runs take one thread each
SMALL = ("cpu", "smoke")


def rows_of(study: dict[str, Any]) -> dict[str, str]:
    """Return the experiments of a study's rows, grids and lines, and its measures, by the names that `rows=` takes."""
    parts = [*study.get("tables", {}).values(), *([study["figure"]] if "figure" in study else [])]
    found = [row["experiment"] for part in parts for row in part.get("rows", part.get("lines"))]
    found += [experiment for grid in study.get("grids", {}).values() for experiment in grid["experiments"].values()]
    return {experiment.split("/", 1)[1]: experiment for experiment in found} | {
        name: name for name in study.get("measures", ())
    }


def scales_of(study: dict[str, Any]) -> list[str]:
    """Return the scales that a study has; scale=cpu is one of those alone that say what it changes."""
    if "measures" in study:
        return ["paper", "smoke"]
    parts = [*study.get("tables", {}).values(), *study.get("grids", {}).values()]
    return ["paper", "gpu", *(["cpu"] if any("cpu" in part.get("scales", {}) for part in parts) else []), "smoke"]


def scale_of(overrides: Sequence[str]) -> str:
    """Return the scale that a command line chooses."""
    return next((item.partition("=")[2] for item in reversed(overrides) if item.startswith("scale=")), "paper")


def works(
    study: dict[str, Any], own: dict[str, str], overrides: Sequence[str], *, again: bool, gpus: int | None = None
) -> list[Work]:
    """Return the work of a study that is not done, or all of it, each with its cost.

    Args:
        own: may have rows=, panels=, folds= and jobs=; the first three are comma-separated.
        gpus: processes of every run under torchrun; measures have none.

    Raises:
        ConfigError: the overrides do not compose with one of the rows, or the study has no such scale.
    """
    tables, grids = study.get("tables", {}).values(), study.get("grids", {}).values()
    if "panels" in own and "figure" not in study:
        arguments.fail(f"{study['name']} has no figure: leave panels= out")
    if "folds" in own and not any("protocols" in table for table in tables):
        arguments.fail(f"{study['name']} has no folds: leave folds= out")
    if "measures" in study and ("jobs" in own or gpus is not None):
        arguments.fail(f"{study['name']} measures one thing after the other, on one thread: leave jobs= and gpus= out")
    scale = scale_of(overrides)
    if scale == "cpu" and scale not in scales_of(study):
        raise ConfigError(f"{study['name']} has no scale=cpu; it has {', '.join(scales_of(study))}")
    named = rows_of(study)
    wanted = [named[name] for name in arguments.some(own, "rows", list(named), study["name"])]
    folded = {row["experiment"] for table in tables if "protocols" in table for row in table["rows"]}
    if "folds" in own and not folded & set(wanted):
        arguments.fail(f"none of the rows {', '.join(wanted)} has folds: leave folds= out")
    found = []
    for table in tables:
        rows = [_row(table, name, (), overrides) for name in _among(wanted, table["rows"])]
        if "protocols" in table:
            # some of the folds alone leave no record that could be missing
            every = again or "folds" in own
            found += [(table, _lacking(folds.work(row, overrides, _folds(own)), every)) for row in rows]
        elif "folds" not in own:
            found.append((table, _lacking(seeds.work(rows, overrides, small=scale in SMALL), again)))
    for grid in grids:
        points, others = _chosen(study["name"], grid, scale, overrides)
        rows = [_row(grid, point.experiment, point.overrides, others) for point in points if point.experiment in wanted]
        found.append((grid, _lacking(seeds.work(rows, others, small=scale in SMALL, traces=True), again)))
    if "figure" in study:
        figure = study["figure"] | {
            "lines": [line for name in wanted for line in study["figure"]["lines"] if line["experiment"] == name]
        }
        panels = arguments.some(own, "panels", [panel["name"] for panel in figure["panels"]], study["name"])
        found.append((figure, lines.work(figure, study["folder"], overrides, panels=panels, again=again)))
    jobs = arguments.count(own, "jobs", None)
    costed = [_costed(work, part, scale, jobs, gpus) for part, work in found if work.runs]
    if "measures" in study:
        costed.append(measuring.work(study, wanted, overrides, again=again))
    return [work for work in costed if work.runs]


def _among(wanted: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    own = {row["experiment"] for row in rows}
    return [experiment for experiment in wanted if experiment in own]


def _row(part: dict[str, Any], experiment: str, own: Sequence[str], overrides: Sequence[str]) -> Row:
    """Return a row with what its scale changes: what its study says, and at scale=smoke what its data allow."""
    scale = scale_of(overrides)
    scaled = list(part.get("scales", {}).get(scale, ()))
    if scale == "smoke":
        choices = plan([f"experiment={experiment}"]).choices
        scaled = [*rehearsal.items(choices["model"], choices["data"], overrides), *scaled]
    return Row(experiment, own, scaled)


def _chosen(name: str, grid: dict[str, Any], scale: str, overrides: Sequence[str]) -> tuple[list[Point], list[str]]:
    """Return the points at which the axes of a grid have the values that `overrides` name, and the other overrides.

    Raises:
        ConfigError: an axis has no such value.
    """
    axes = studies.axes(grid, scale)
    asked = [item for item in overrides if item.partition("=")[0] in axes]
    found = studies.points(grid, scale)
    for item in parse(asked):
        key, wanted = item.key_or_group, set()
        for value in item.sweep_iterator() if item.is_sweep_override() else [item.value()]:
            own = [each for each in axes[key] if each == value and not isinstance(value, bool)]
            if not own:
                raise ConfigError(
                    f"{name}: {key}={value} is no point of the grid; {key} is one of {', '.join(map(str, axes[key]))}"
                )
            wanted.add(f"{key}={own[0]}")
        found = [point for point in found if wanted & set(point.overrides)]
    return found, [item for item in overrides if item not in asked]


def _lacking(work: Work, again: bool) -> Work:
    return work if again else replace(work, runs=[run for run in work.runs if not run.kept.exists()])


def _costed(work: Work, part: dict[str, Any], scale: str, jobs: int | None, gpus: int | None) -> Work:
    work = replace(work, runs=[run._replace(gpus=gpus) for run in work.runs])
    return replace(work, cost=costs.told(work.runs, at_a_time(work, jobs), part.get("cost", {}).get(scale)))


def _folds(own: dict[str, str]) -> list[int]:
    every = [str(fold) for fold in range(folds.NUM_FOLDS)]
    return [int(fold) for fold in arguments.some(own, "folds", every, "a row")]
