"""The studies of this repository: a study is a folder of results/ with its definition, its records and its pages.

results/<study>/study.yaml has a `title`, and what the study shows:

    tables     by the name of its page: `rows` of experiments, whose seeds are averaged, or with `protocols` their
               folds, or with a `target` the seconds of training until their metric is as good. A row has a `name`,
               an `experiment` and what the `paper` has, "--" where that is nothing; a table has a `title`, and but for
               those with protocols the `metric` of a `split` and its `std`, sample or population
    grids      `experiments` by name, each at every point of the `grid` of its scale; a `function` of
               scripts/reporting/grids/ draws them
    figure     `lines` of experiments, each in every one of the `panels`: curves of a metric over the epochs
    measures   by the name of its record and page: a `function` of scripts/running/measures/ with its `settings`, what
               `smoke` changes of them, and its `cost` in seconds of one core; scripts/reporting/measures/ draws it
    benchmark  `rows` of timed training steps
    explore    names of comparisons of gradient estimators and solvers on a trained model

Tables and grids may have `scales`, the items that a smaller scale changes in every row, and `cost`, the seconds of one
core that a run takes at a scale.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
# the keys that the parts of a definition need
NEEDED = {
    "tables": ("title", "rows"),
    "grids": ("title", "function", "experiments", "grid"),
    "measures": ("function", "settings", "smoke", "cost"),
}
ROW = ("name", "experiment", "paper")


def results() -> Path:
    """Return the folder of all studies."""
    return ROOT / "results"


def names() -> list[str]:
    """Return the names of all studies, as paths below results/."""
    return sorted(path.parent.relative_to(results()).as_posix() for path in results().rglob("study.yaml"))


def load(name: str) -> dict[str, Any]:
    """Return the definition of a study, with its `name` and its `folder`.

    Raises:
        StudyError: it is no YAML, or lacks a key.
    """
    folder = results() / name
    path = folder / "study.yaml"
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise StudyError(f"{path} is no YAML ({error})") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path} has no keys: it needs a title, and what the study shows; see scripts/studies.py")
    for where, part, needed in _parts(found):
        missing = [key for key in needed if not isinstance(part, dict) or key not in part]
        if missing:
            raise StudyError(f"{path}: {where} lacks {', '.join(missing)}; see scripts/studies.py")
    return {"name": name, "folder": folder, **found}


def _parts(study: dict[str, Any]) -> Iterator[tuple[str, Any, Sequence[str]]]:
    """Yield where a part of a definition stands, the part, and the keys that it needs."""
    yield "the study", study, ("title",)
    for group, needed in NEEDED.items():
        for name, part in (study.get(group) or {}).items():
            yield f"{group}.{name}", part, needed
            rows = part.get("rows", ()) if group == "tables" and isinstance(part, dict) else ()
            yield from ((f"row {i} of tables.{name}", row, ROW) for i, row in enumerate(rows or ()))
            if rows and "protocols" not in part:
                yield f"tables.{name}", part, ("metric", "split", "std")


def leaf(group: str, name: str) -> dict[str, Any]:
    """Return a leaf of configs/ as it stands in its file; nothing where there is none of that name."""
    path = ROOT / "configs" / group / f"{name}.yaml"
    return yaml.safe_load(path.read_text("utf-8")) or {} if path.is_file() else {}


class Point(NamedTuple):
    """A point of a grid: the name of its experiment in the figure, the experiment, and what differs from it."""

    name: str
    experiment: str
    overrides: tuple[str, ...]


def points(grid: dict[str, Any], scale: str) -> list[Point]:
    """Return every point of a grid at a scale; a scale without a grid of its own has the paper's."""
    axes = grid["grid"].get(scale, grid["grid"]["paper"])
    settings = itertools.product(*([f"{key}={value}" for value in values] for key, values in axes.items()))
    return [
        Point(name, experiment, setting) for setting in settings for name, experiment in grid["experiments"].items()
    ]


def record_folder(experiment: str, scale: str, overrides: Sequence[str] = ()) -> Path:
    """Return the folder of the records of an experiment at a scale, or of one of its points."""
    label = experiment if scale == "paper" else f"{experiment}@{scale}"
    return results() / (f"{label}@{','.join(sorted(overrides))}" if overrides else label)


class StudyError(RuntimeError):
    """A definition or a record that cannot be used; the message says which, and what to do."""


def record(path: Path) -> Any:
    """Return what a record in results/ holds.

    Raises:
        StudyError: it is cut short, or no JSON, as after a merge with a conflict.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}): restore it, git checkout {path}, or remove it") from error


def curves(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a figure kept in `path`, one entry a panel and line; none where nothing has been run."""
    return record(path)["runs"] if path.exists() else []
