"""What a sweep leaves: sweep.json with every point of its grid, and the table that ends it.

A point is a choice of all keys that were swept but the seed; its seeds are averaged. `python scripts/report.py
sweep=<folder>` renders the file.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from phantom.engine.artifacts import identity, journal, records
from phantom.engine.config.overrides import expand, parse
from phantom.engine.machine import launcher
from phantom.engine.plan import Plan

SHADES = " ░▒▓█"
# the columns of a point: name in sweep.json, head, and format of its mean
COLUMNS = (
    ("best", "best", ".2f"),
    ("last", "last", ".2f"),
    ("seconds", "seconds", ".0f"),
    ("step_ms", "ms per step", ".1f"),
    ("cosine", "cosine", ".3f"),
)


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        values: what it has for every swept key.
        folder: its run folder.
    """

    values: dict[str, str]
    folder: Path


@dataclass
class Sweep:
    """The jobs of a sweep in their order, and why some of them failed.

    Args:
        command: the command line, to be pasted.
        folder: where sweep.json goes, a pure function of the command line.
        metric, split, mode: what is compared: the headline metric on the first evaluated split; `max` or `min`.
        reasons: by the number of a failed job.
    """

    command: str
    folder: Path
    metric: str
    split: str
    mode: str
    jobs: list[Job]
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Sequence[str], plans: Sequence[Plan]) -> Sweep:
        """Return the sweep of `train.py -m <items>`, whose jobs have these plans."""
        swept = [item.get_key_element() for item in parse(items) if item.is_sweep_override()]
        every = [{key: value for key, _, value in (item.partition("=") for item in job)} for job in expand(items)]
        jobs = [
            Job({key: values[key] for key in swept}, plan.folder) for values, plan in zip(every, plans, strict=True)
        ]
        first = plans[0]
        return cls(
            command=shlex.join(["python", "train.py", "-m", *items]),
            folder=_folder(items, plans),
            metric=first.task.metric,
            split=first.config["eval_splits"][0],
            mode=first.task.mode,
            jobs=jobs,
        )

    def close(self) -> dict[str, Any]:
        """Print the table, write sweep.json, and return what was written.

        Raises:
            OSError: the disk is full, or may not be written to.
        """
        content = self.content()
        if launcher.rank() == 0:
            print(table(content), flush=True)
            records.write_json(self.folder / "sweep.json", content)
            again = shlex.join(["python", "scripts/report.py", f"sweep={self.folder}"])
            print(f"draw it again: {again}", flush=True)
        return content

    def content(self) -> dict[str, Any]:
        """Return the sweep as plain values: the numbers of every seed by point, and the failed jobs."""
        points: dict[tuple[tuple[str, str], ...], dict[str, list[float]]] = {}
        failed = []
        for number, job in enumerate(self.jobs):
            path = job.folder / "record.json"
            reason = self.reasons.get(number, None if path.exists() else "it left no record")
            if reason is not None:
                failed.append({"values": job.values, "reason": reason})
                continue
            found = self._measured(json.loads(path.read_bytes()), job.folder)
            place = tuple((key, value) for key, value in job.values.items() if key != "seed")
            point = points.setdefault(place, {name: [] for name, _, _ in COLUMNS})
            for name, value in found.items():
                point[name].append(value)
        return {
            "command": self.command,
            "metric": self.metric,
            "split": self.split,
            "mode": self.mode,
            "keys": [key for key in self.jobs[0].values if key != "seed"],
            "rows": [{"values": dict(place), **point} for place, point in points.items()],
            "failed": failed,
        }

    def _measured(self, record: Mapping[str, Any], folder: Path) -> dict[str, float]:
        """Return the numbers of a run that it has; in a record, null is a number that was not finite."""
        found = {
            "best": record["best"].get(self.split, {}).get(self.metric),
            "last": record["final"].get(self.split, {}).get(self.metric),
            "seconds": record["wall_seconds"],
            "step_ms": 1e3 * record["times"]["step"]["median"] if "step" in record["times"] else None,
            "cosine": _cosine(folder),
        }
        return {name: value for name, value in found.items() if value is not None}


def _folder(items: Sequence[str], plans: Sequence[Plan]) -> Path:
    """Return runs/sweeps/<label>/<items>, where jobs of several estimators share model and data of their labels."""
    labels = {plan.label for plan in plans}
    if len(labels) > 1:
        labels = {label.rpartition("-")[0] for label in labels}
    shared = labels.pop() if len(labels) == 1 else ""
    # the label names one experiment, but not several
    named = [item.replace("experiment=", "experiments=", 1) if "," in item else item for item in items]
    return identity.run_folder(plans[0].root / "sweeps", shared or "several", named, 0).parent


def _cosine(folder: Path) -> float | None:
    """Return the mean cosine of the run's own gradient to the exact one, where its monitor measured that."""
    rows = journal.rows(folder / "metrics.jsonl")
    measured = [row.get("gradient_cosine") for row in rows if row.get("kind") == "monitor"]
    values = [cosine for cosine in measured if cosine is not None]  # null is one that is not finite
    return fmean(values) if values else None


def table(content: Mapping[str, Any]) -> str:
    """Return what a person sees at the end: a row per point, the means as a map of shades, and the failed jobs."""
    keys, rows = content["keys"], content["rows"]
    shown = [column for column in COLUMNS if any(row[column[0]] for row in rows)]
    lines = [[*keys, "n", *(head for _, head, _ in shown)]]
    for row in rows:
        means = [format(fmean(row[name]), form) if row[name] else "--" for name, _, form in shown]
        lines.append([*(row["values"][key] for key in keys), str(len(row["seconds"])), *means])
    parts = [f"{content['split']} {content['metric']}, means over the seeds (n)", _aligned(lines)] if rows else []
    parts += _maps(content)
    if content["failed"]:
        jobs = [(" ".join(f"{key}={value}" for key, value in job["values"].items()), job) for job in content["failed"]]
        parts.append("\n".join([f"failed: {len(jobs)}", *(f"  {name}: {job['reason']}" for name, job in jobs)]))
    return "\n\n".join(parts)


def _maps(content: Mapping[str, Any]) -> list[str]:
    """Return a map of the best values over the last two keys for every choice of the others; darker is better."""
    keys, rows = content["keys"], [row for row in content["rows"] if row["best"]]
    if len(keys) < 2 or len(rows) < 2:
        return []
    *others, down, across = keys
    best = {tuple(row["values"][key] for key in keys): fmean(row["best"]) for row in rows}
    low, high = min(best.values()), max(best.values())
    sign = 1 if content["mode"] == "max" else -1
    ends = (low, high) if sign > 0 else (high, low)

    def cell(place: tuple[str, ...]) -> str:
        if place not in best:
            return "--"
        share = (best[place] - ends[0]) / (ends[1] - ends[0]) if high > low else 1.0
        return f"{best[place]:.2f} {SHADES[round(share * (len(SHADES) - 1))]}"

    choices = {key: list(dict.fromkeys(row["values"][key] for row in rows)) for key in keys}
    found = []
    for setting in itertools.product(*(choices[key] for key in others)):
        title = " ".join(f"{key}={value}" for key, value in zip(others, setting, strict=True))
        lines = [[f"{down} \\ {across}", *choices[across]]]
        lines += [[value, *(cell((*setting, value, other)) for other in choices[across])] for value in choices[down]]
        found.append("\n".join([f"best {content['metric']} {title}".rstrip(), _aligned(lines)]))
    return found


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    )
