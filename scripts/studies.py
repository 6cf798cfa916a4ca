"""The studies of this repository: a study is a folder of results/ with its definition, its records and its pages.

results/<study>/study.yaml has a `title`, and what the study shows:

    tables     by the name of its page: `rows` of experiments, whose seeds are averaged, or with `protocols` their folds
    figure     `lines` of experiments, each in every one of the `panels`: curves of a metric over the epochs
    measures   by the name of its record and page: a `function` of scripts/running/measures/ with its `settings`, what
               `smoke` changes of them, and its `cost` in seconds of one core; scripts/reporting/measures/ draws it
    benchmark  `rows` of timed training steps
    explore    names of comparisons of gradient estimators and solvers on a trained model
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def results() -> Path:
    """Return the folder of all studies."""
    return ROOT / "results"


def names() -> list[str]:
    """Return the names of all studies, as paths below results/."""
    return sorted(path.parent.relative_to(results()).as_posix() for path in results().rglob("study.yaml"))


def load(name: str) -> dict[str, Any]:
    """Return the definition of a study, with its `name` and its `folder`."""
    folder = results() / name
    return {"name": name, "folder": folder, **yaml.safe_load((folder / "study.yaml").read_text())}


def curves(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a figure kept in `path`, one entry a panel and line; none where nothing has been run."""
    return json.loads(path.read_text())["runs"] if path.exists() else []
