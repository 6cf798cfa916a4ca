"""Committed records as runs of Weights & Biases, after the fact: what they were made with, their curves, their end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts import studies
from scripts.reporting.html.payload import at, payload


def send(wandb: Any, *, project: str, entity: str | None, mode: str, say: Callable[[str], None]) -> int:
    """Send every committed record of a training as a run; return how many. A run sent before is written again.

    Args:
        wandb: the module.
        mode: online, or offline for files that `wandb sync` uploads later.
    """
    content = payload(None)
    for run in content["runs"]:
        curves = [curve for curve in content["curves"] if curve.get("run") == run["record"]]
        begun = wandb.init(
            project=project,
            entity=entity,
            mode=mode,
            id=hashlib.sha256(run["record"].encode()).hexdigest()[:12],
            resume="allow",
            name=run["record"].removeprefix("results/").removesuffix(".json"),
            group=run["label"],
            job_type="record",
            tags=[run[key] for key in ("model", "data", "grad", "scale") if run[key] != "--"],
            config=_config(run),
            settings=wandb.Settings(silent=True),
        )
        begun.define_metric("step")
        begun.define_metric("*", step_metric="step")
        for step, row in rows(curves):
            begun.log({**row, "step": step})
        begun.summary.update(summary(run))
        begun.finish()
        say(run["record"])
    return len(content["runs"])


def rows(curves: Sequence[Mapping[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """Return (step, values by name) of curves, by step."""
    found: dict[float, dict[str, float]] = {}
    for curve in curves:
        for step, value in zip(curve["x"], curve["y"], strict=True):
            found.setdefault(step, {})[curve["name"]] = value
    return sorted(found.items())


def summary(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a record under the names that a run's own record has in its summary."""
    found: dict[str, Any] = {}
    for number in run["numbers"].values():
        *outer, last = number["place"]
        inner = found
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = number["value"]
    assert all(at(found, number["place"]) == number["value"] for number in run["numbers"].values())
    return found


def _config(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the dashboards group by, under the names of a run's own config, and where the run comes from."""
    numbers = {key: float(run[key]) for key in ("k", "lam") if run[key] != "--"}
    leaves = {key: run[key] for key in ("model", "data", "scale", "record", "command", "commit")}
    leaf = studies.leaf("grad", run["grad"])
    target = leaf.get("grad", leaf).get("_target_", run["grad"])
    return {**leaves, "grad": {"_target_": target, **numbers}, **numbers}
