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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
# the keys that the parts of a definition need, and those without which they have no page
NEEDED = {"tables": ("rows",), "grids": ("experiments", "grid"), "measures": ("function",)}
SHOWN = {"tables": ("title",), "grids": ("title", "function"), "measures": ()}


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
    study = {"name": name, "folder": folder, **found}
    parts = _parts(found, NEEDED)
    rows = [(f"row {i} of {where}", row, ("experiment",)) for where, part, _ in parts for i, row in _rows(part)]
    _check(study, [("the study", found, ("title",)), *parts, *rows])
    return study


def check_shown(study: dict[str, Any]) -> None:
    """Raise StudyError where a part of a definition lacks what its page needs."""
    parts = _parts(study, SHOWN)
    rows = [(f"row {i} of {where}", row, ("name", "paper")) for where, part, _ in parts for i, row in _rows(part)]
    means = [(where, part, ("metric", "split", "std")) for where, part, _ in parts if "protocols" not in part]
    _check(study, [*parts, *rows, *(one for one in means if "rows" in one[1])])


def _parts(study: dict[str, Any], keys: Mapping[str, Sequence[str]]) -> list[tuple[str, Any, Sequence[str]]]:
    """Return (where it stands, part, the keys that it needs) of every part of a study."""
    return [(f"{group}.{name}", part, keys[group]) for group in keys for name, part in (study.get(group) or {}).items()]


def _rows(part: Any) -> Iterable[tuple[int, Any]]:
    return enumerate(part.get("rows") or ()) if isinstance(part, dict) else ()


def _check(study: dict[str, Any], parts: Iterable[tuple[str, Any, Sequence[str]]]) -> None:
    for where, part, needed in parts:
        missing = [key for key in needed if not isinstance(part, dict) or key not in part]
        if missing:
            path = study["folder"] / "study.yaml"
            raise StudyError(f"{path}: {where} lacks {', '.join(missing)}; see scripts/studies.py")


def leaf(group: str, name: str) -> dict[str, Any]:
    """Return a leaf of configs/ as it stands in its file; nothing where there is none of that name."""
    path = ROOT / "configs" / group / f"{name}.yaml"
    return yaml.safe_load(path.read_text("utf-8")) or {} if path.is_file() else {}


class Point(NamedTuple):
    """A point of a grid: the name of its experiment in the figure, the experiment, and what differs from it."""

    name: str
    experiment: str
    overrides: tuple[str, ...]


def axes(grid: dict[str, Any], scale: str) -> dict[str, list[Any]]:
    """Return the values by key of a grid at a scale; a scale without a grid of its own has the paper's."""
    return grid["grid"].get(scale, grid["grid"]["paper"])


def points(grid: dict[str, Any], scale: str) -> list[Point]:
    """Return every point of a grid at a scale."""
    settings = itertools.product(*([f"{key}={value}" for value in values] for key, values in axes(grid, scale).items()))
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
