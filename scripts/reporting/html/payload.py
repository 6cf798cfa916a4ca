"""The numbers of the report page, each beside the record that it comes from and its place there."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts import logged, studies
from scripts.reporting import explore, provenance
from scripts.reporting.html.chosen import chosen
from scripts.reporting.html.others import others

PHASES = ("solve", "attach", "backward", "optimizer", "rest")
# numbers that every row of metrics.jsonl has, and no curve
PLACES = ("step", "epoch")
# of the record in a run folder, which may be anybody's: what the page cannot do without
FIELDS = {
    **{"label": str, "metric": str, "overrides": list, "best": dict, "seed": int},
    **{"commit": (str, type(None)), "dirty": (bool, type(None))},
}

# None in the place of a curve stands for the row of each of its points
Place = Sequence[str | int | None]


def payload(runs: Path | None) -> dict[str, Any]:
    """Return what the page draws and filters.

    Args:
        runs: a folder of run folders, whose records and metrics.jsonl join the committed records; None for none.
    """
    found = [*_committed(), *(_local(runs) if runs is not None else ())]
    return {
        "runs": [run for run, _ in found],
        "curves": [curve for _, curves in found for curve in curves] + _figure_curves(),
        "benchmarks": _benchmarks(),
        "explorations": _explorations(),
    }


def number(content: Any, place: Place) -> dict[str, Any] | None:
    """Return `{value, place}` of a number in a record; None where the record does not have it, or it is not finite."""
    value = _finite(at(content, place))
    return None if value is None else {"value": value, "place": list(place)}


def at(content: Any, place: Place) -> Any:
    """Return what lies at a place of a record, as in `["best", "test", "accuracy"]`; None where nothing does."""
    for key in place:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def _finite(value: Any) -> int | float | None:
    """Return a number as it is, and None for one that is not finite, which JSON does not have, or for no number."""
    return value if isinstance(value, (int, float)) and abs(value) < math.inf else None


def name_of(path: Path) -> str:
    """Return a path as the page shows it: relative to the repository where it lies there."""
    absolute, root = path.absolute(), studies.ROOT.absolute()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.as_posix()


def _committed() -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield (run, its curves) of every committed record of a training."""
    for path in sorted(studies.results().rglob("*.json")):
        content = studies.record(path)
        if isinstance(content, dict) and "metric" in content and ("best" in content or "protocols" in content):
            run = _run(content, path)
            run["label"] += _set_apart(content["label"], path)
            yield run, _curves(run, content.get("monitor", []), name_of(path), ("monitor",))


def _set_apart(label: str, path: Path) -> str:
    """Return the name by which the folder of a record is set apart by hand, as `@jpeg_copies`; else nothing.

    Nothing else on the page says that such a record is none of the row whose label it has. Settings are in its command.
    """
    folder = path.parent.relative_to(studies.results()).as_posix()
    name = folder.removeprefix(label)
    return name if folder.startswith(f"{label}@") and "=" not in name else ""


def _local(folder: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield (run, its curves) of every finished run folder below `folder`; say of the others why they are left out."""
    for path in sorted(path for path in folder.rglob("record.json") if path.is_file()):
        metrics = path.with_name("metrics.jsonl")
        try:
            run = _run(_record(path), path)
            rows, damaged = logged.read(metrics) if metrics.is_file() else ([], 0)
        except (OSError, ValueError, RecursionError) as error:
            print(f"{path} is left out: {error}", file=sys.stderr)
            continue
        if damaged:
            print(f"{metrics}: damaged lines are left out ({damaged})", file=sys.stderr)
        yield run, _curves(run, rows, name_of(metrics), ())


def _record(path: Path) -> dict[str, Any]:
    """Return the record of a run folder.

    Raises:
        OSError, ValueError: it cannot be read, is damaged, or is not that of a run.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it is no record of a run")
    wrong = [name for name, kind in FIELDS.items() if name not in content or not isinstance(content[name], kind)]
    wrong += ["overrides"] * (not all(isinstance(item, str) for item in content.get("overrides") or ()))
    wrong += ["choices"] * (not isinstance(content.get("choices", {}), dict))
    if wrong:
        raise ValueError(f"it is no record of a run, which has another field {wrong[0]}")
    if not content["best"]:
        raise ValueError("the run has no evaluation")
    return content


def _run(content: dict[str, Any], path: Path) -> dict[str, Any]:
    if "protocols" in content:
        places: dict[str, Place] = {
            "best": ("protocols", "best_epoch", "mean"),
            "last": ("protocols", "last_epoch", "mean"),
        }
    else:
        split = next(iter(content["best"]))
        places = {name: (key, split, content["metric"]) for name, key in (("best", "best"), ("last", "final"))}
        places |= {"step_seconds": ("times", "step", "median"), "peak_bytes": ("peak_memory",)}
    places |= {"steps": ("steps",), "parameters": ("num_parameters",), "seed": ("seed",)}
    numbers = {name: number(content, place) for name, place in places.items()}
    return {
        "record": name_of(path),
        "command": provenance.command(content),
        "label": content["label"],
        "metric": content["metric"],
        **chosen(content),
        "others": others(content),
        "training": _training(content),
        "commit": provenance.commit(content),
        "numbers": {name: found for name, found in numbers.items() if found is not None},
    }


def _training(content: dict[str, Any]) -> str:
    """Return what all records of one training share, wherever they lie: its config, with the seed, and its data."""
    if "config_hash" not in content:
        return provenance.command(content)
    return " ".join([content["config_hash"], *(content.get("data_digests") or {}).values()])


def _curves(run: dict[str, Any], rows: list[dict[str, Any]], record: str, place: Place) -> list[dict[str, Any]]:
    """Return a curve per number that the rows log: its steps, and the rows and the place where its points lie."""
    found: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        for key, value in row.items():
            if key in PLACES or isinstance(value, bool) or _finite(value) is None:
                continue
            name = f"{row.get('split', row.get('kind', 'monitor'))}/{key}"
            about = {"run": run["record"], "record": record, "name": name, "place": [*place, None, key]}
            curve = found.setdefault(name, {**about, "x": [], "y": [], "rows": []})
            curve["x"].append(row["step"])
            curve["y"].append(value)
            curve["rows"].append(i)
    return [curve for curve in found.values() if len(curve["y"]) > 1]


def _figure_curves() -> list[dict[str, Any]]:
    """Return the committed curves of the figures, an entry a panel and line."""
    found = []
    for study in map(studies.load, studies.names()):
        path = study["folder"] / "curves.json"
        for i, entry in enumerate(studies.curves(path) if "figure" in study else []):
            found.append(
                {
                    **chosen(entry),
                    "label": f"{study['name']}, {entry['panel']}: {entry['line']}",
                    "command": provenance.command(entry),
                    "record": name_of(path),
                    "name": f"{entry['split']}/{entry['metric']} by epoch",
                    "x": entry["epochs"],
                    "y": list(map(_finite, entry["values"])),
                    "place": ["runs", i, "values", None],
                    "rows": list(range(len(entry["values"]))),
                }
            )
    return found


def _benchmarks() -> list[dict[str, Any]]:
    found = []
    for study in map(studies.load, studies.names()):
        for part in study.get("benchmark", {}).get("rows", []):
            path = study["folder"] / f"{part['name']}.json"
            if not path.exists():
                continue
            content = studies.record(path)
            bars = [{"label": row["label"], "phases": _phases(content, i)} for i, row in enumerate(content["rows"])]
            if not any(bar["phases"] for bar in bars):  # of solves alone, whose table is with its study
                continue
            about = content["about"]
            found.append(
                {"title": f"{part['title']} ({about['machine']})", "record": name_of(path)}
                | {"command": about["command"], "bars": bars}
            )
    return found


def _phases(content: dict[str, Any], row: int) -> dict[str, dict[str, Any]]:
    found = {phase: number(content, ("rows", row, "seconds", phase, "median")) for phase in PHASES}
    return {phase: value for phase, value in found.items() if value is not None}


def _explorations() -> list[dict[str, Any]]:
    found = []
    for study in map(studies.load, studies.names()):
        for name in study.get("explore", []):
            path = study["folder"] / f"{name}.json"
            if not path.exists():
                continue
            content = studies.record(path)
            points = [
                {"label": row["estimator"], "family": explore.family(row["estimator"])}
                | {key: number(content, ("rows", i, key)) for key in ("seconds", "cosine")}
                for i, row in enumerate(content["rows"])
            ]
            found.append(
                {"title": content["title"], "record": name_of(path), "command": content["command"]}
                | {"points": [point for point in points if point["seconds"] and point["cosine"]]}
            )
    return found
