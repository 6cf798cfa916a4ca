"""The numbers of the report page, each beside the record that it comes from and its place there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts import studies
from scripts.reporting import provenance
from scripts.reporting.html.chosen import chosen

PHASES = ("solve", "attach", "backward", "optimizer", "rest")
# of a benchmark's row by phase
SECONDS = ("seconds", "median")
# numbers that every row of metrics.jsonl has, and no curve
PLACES = ("step", "epoch")

Place = Sequence[str | int]


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
    """Return `{value, place}` of a number in a record; None where the record does not have it."""
    value = at(content, place)
    return {"value": value, "place": list(place)} if isinstance(value, (int, float)) else None


def at(content: Any, place: Place) -> Any:
    """Return what lies at a place of a record, as in `["best", "test", "accuracy"]`; None where nothing does."""
    for key in place:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def name_of(path: Path) -> str:
    """Return a path as the page shows it: relative to the repository where it lies there."""
    absolute, root = path.absolute(), studies.ROOT.absolute()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.as_posix()


def _committed() -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield (run, its curves) of every committed record of a training."""
    for path in sorted(studies.results().rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "metric" in content and ("best" in content or "protocols" in content):
            run = _run(content, path)
            yield run, _curves(run, content.get("monitor", []), name_of(path), ["monitor"])


def _local(folder: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield (run, its curves) of every finished run folder below `folder`."""
    for path in sorted(folder.rglob("record.json")):
        run, metrics = _run(json.loads(path.read_text()), path), path.with_name("metrics.jsonl")
        rows = studies.logged(path.parent) if metrics.exists() else []
        yield run, _curves(run, rows, name_of(metrics), [])


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
        "commit": provenance.commit(content),
        "numbers": {name: found for name, found in numbers.items() if found is not None},
    }


def _curves(run: dict[str, Any], rows: list[dict[str, Any]], record: str, place: Place) -> list[dict[str, Any]]:
    """Return a curve per number that the rows log: where each of its points lies in the record, and its steps."""
    found: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        for key, value in row.items():
            if key in PLACES or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            name = f"{row.get('split', row.get('kind', 'monitor'))}/{key}"
            empty = {"run": run["record"], "record": record, "name": name, "x": [], "y": [], "places": []}
            curve = found.setdefault(name, empty)
            curve["x"].append(row["step"])
            curve["y"].append(value)
            curve["places"].append([*place, i, key])
    return [curve for curve in found.values() if len(curve["y"]) > 1]


def _figure_curves() -> list[dict[str, Any]]:
    """Return the committed curves of the figures, an entry a panel and line."""
    found = []
    for study in map(studies.load, studies.names()):
        path = study["folder"] / "curves.json"
        for i, entry in enumerate(studies.curves(path) if "figure" in study else []):
            places = [["runs", i, "values", j] for j in range(len(entry["values"]))]
            found.append(
                {
                    **chosen(entry),
                    "label": f"{study['name']}, {entry['panel']}: {entry['line']}",
                    "command": provenance.command(entry),
                    "record": name_of(path),
                    "name": f"{entry['split']}/{entry['metric']} by epoch",
                    "x": entry["epochs"],
                    "y": entry["values"],
                    "places": places,
                }
            )
    return found


def _benchmarks() -> list[dict[str, Any]]:
    found = []
    for study in map(studies.load, studies.names()):
        for part in study.get("benchmark", {}).get("rows", []):
            path = study["folder"] / f"{part['name']}.json"
            if path.exists():
                content = json.loads(path.read_text())
                bars = [
                    {
                        "label": row["label"],
                        "phases": {phase: value for phase in PHASES if (value := _phase(content, i, phase))},
                    }
                    for i, row in enumerate(content["rows"])
                ]
                about = content["about"]
                found.append(
                    {"title": f"{part['title']} ({about['machine']})", "record": name_of(path)}
                    | {"command": about["command"], "bars": bars}
                )
    return found


def _phase(content: dict[str, Any], row: int, phase: str) -> dict[str, Any] | None:
    return number(content, ("rows", row, SECONDS[0], phase, SECONDS[1]))


def _explorations() -> list[dict[str, Any]]:
    found = []
    for study in map(studies.load, studies.names()):
        for name in study.get("explore", []):
            path = study["folder"] / f"{name}.json"
            content = json.loads(path.read_text())
            points = [
                {"label": row["estimator"]} | {key: number(content, ("rows", i, key)) for key in ("seconds", "cosine")}
                for i, row in enumerate(content["rows"])
            ]
            found.append(
                {"title": content["title"], "record": name_of(path), "command": content["command"]}
                | {"points": [point for point in points if point["seconds"] and point["cosine"]]}
            )
    return found
