"""What runs will cost, from the records of runs of the same kind."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts import studies
from scripts.running.process import Run


def told(runs: Sequence[Run], jobs: int, estimate: float | None = None) -> str:
    """Return a sentence: the hours of these runs, where each number comes from, and how many are unknown.

    A run costs what runs of its row at its scale did, in the median; otherwise what runs of the same model, data,
    estimator and scale did; otherwise what its study estimates.

    Args:
        jobs: how many run at a time.
        estimate: seconds per run by the study.
    """
    known = list(_records(studies.results()))
    total, origins, unknown, devices = 0.0, {"records": 0, "the study's estimate": 0}, [], set()
    for run in runs:
        alike = _alike(run, known)
        if alike:
            total += statistics.median(record["seconds"] for record in alike)
            devices |= {record["device"] for record in alike}
            origins["records"] += 1
        elif estimate is not None:
            total += estimate
            origins["the study's estimate"] += 1
        else:
            unknown.append(run.name)
    parts = []
    counts = [f"{count} by {origin}" for origin, count in origins.items() if count]
    if counts:
        where = f" on {', '.join(sorted(devices))}" if devices else ""
        at_a_time = f", {jobs} at a time: {duration(total / jobs)}" if jobs > 1 else ""
        parts.append(f"About {duration(total)}{at_a_time} ({', '.join(counts)}{where})")
    if unknown:
        names = ", ".join(unknown[:3]) + ", ..." * (len(unknown) > 3)
        parts.append(f"No record says what {len(unknown)} cost: {names}")
    return ". ".join(parts)


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _alike(run: Run, known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    own = [record for record in known if record["label"] == run.label]
    return own or [record for record in known if run.kind is not None and record["kind"] == run.kind]


def _records(folder: Path) -> Iterable[dict[str, Any]]:
    """Yield label, kind, seconds and device of every run that has a record."""
    for path in folder.rglob("*.json"):
        content = studies.record(path)
        for record in content.get("runs", [content]) if isinstance(content, dict) else []:
            seconds = record.get("cpu_seconds") if "folds" in record else record.get("wall_seconds")
            seconds = record.get("cpu_seconds") if seconds is None else seconds
            seconds = seconds["mean"] if isinstance(seconds, dict) else seconds
            if "label" in record and seconds is not None:
                choices, scale = record.get("choices"), record.get("scale")
                kind = kind_of(choices, scale) if choices and scale else None
                yield {"label": record["label"], "kind": kind, "seconds": seconds, "device": record["device"]}


def kind_of(choices: dict[str, Any], scale: str) -> tuple[str, ...]:
    """Return what makes runs cost alike: model, data, estimator and scale."""
    return (*(str(choices.get(group)) for group in ("model", "data", "grad")), scale)
