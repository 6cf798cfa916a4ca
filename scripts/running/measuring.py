"""The measures of a study: functions of scripts/running/measures/ that take settings and return what they measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

from phantom.engine.artifacts import files, provenance, records
from phantom.engine.config.overrides import parse
from phantom.engine.errors import ConfigError
from scripts.running.process import Run, Work
from scripts.running.stopping import Stop


def work(study: dict[str, Any], names: Sequence[str], overrides: Sequence[str], *, again: bool) -> Work:
    """Return the measures of a study that have no record, or all of them.

    A record is <name>.json in the study's folder; a scale or settings other than the paper's are in the file's name.

    Args:
        overrides: `scale=` and settings of the measures.

    Raises:
        ConfigError: a scale or a setting that a measure does not have.
    """
    runs, begun, costs = [], {}, []
    for name in names:
        part = study["measures"][name]
        scale, chosen = _settings(f"{study['name']}, {name}", part, overrides)
        scale_suffix = "" if scale == "paper" else f"@{scale}"
        changed = [item for item in overrides if not item.startswith("scale=")]
        variant = f"@{','.join(sorted(changed))}" if changed else ""
        kept = study["folder"] / f"{name}{scale_suffix}{variant}.json"
        if again or not kept.exists():
            line = [study["name"], f"rows={name}", *overrides, *(["again"] if again else [])]
            run = Run(f"{study['name']}, {name}", line, study["folder"], kept, program="scripts/reproduce.py")
            runs.append(run)
            begun[run.name] = (part["function"], scale, chosen)
            cost = "cost unknown with these settings" if changed else f"about {part['cost'][scale]} s of one core"
            costs.append(f"{name}: {cost}")

    def take(run: Run, alone: bool, stop: Stop) -> dict[str, Any]:
        function, scale, chosen = begun[run.name]
        measure = import_module(f"scripts.running.measures.{function}").measure
        return {"study": study["name"], "command": run.line(), "scale": scale, **record(measure, chosen)}

    return Work(runs, lambda run, found: write(found, run.kept), take=take, cost="; ".join(costs))


def record(measure: Callable[..., dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a measure found on one thread, with its settings, circumstances and CPU seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same numbers on every machine of a kind, and an honest CPU time
    about = provenance.environment(torch.device("cpu"))
    started, begun = provenance.now(), time.process_time()
    try:
        found = measure(**settings)
    finally:
        torch.set_num_threads(threads)
    times = {"started": started, "finished": provenance.now(), "cpu_seconds": round(time.process_time() - begun, 1)}
    return {"settings": settings, **about, **times, **found}


def write(content: dict[str, Any], path: Path) -> None:
    """Write a record, a line per key and per row: curves of hundreds of values would fill as many lines each."""
    parts = [f"{records.to_json(key)}: {_rows(value)}" for key, value in content.items()]
    files.write(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def _rows(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return "[\n" + ",\n".join(records.to_json(row) for row in value) + "\n]"
    return records.to_json(value)


def _settings(where: str, part: dict[str, Any], overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the scale, and the settings of a measure under the overrides."""
    found = dict(item.split("=", 1) for item in overrides)
    scale = found.pop("scale", "paper")
    scales = {"paper": {}, "smoke": part["smoke"]}
    if scale not in scales:
        raise ConfigError(f"scale={scale}: {where} has the scales {', '.join(scales)}")
    unknown = [key for key in found if key not in part["settings"]]
    if unknown:
        raise ConfigError(f"{where} has no setting {', '.join(unknown)}; it has {', '.join(part['settings'])}")
    chosen = part["settings"] | scales[scale]
    for key, text in found.items():
        # YAML takes 1e-6 for a word; and words, as train.py wants them quoted, are plain in a study.yaml
        value = parse([f"{key}={text}"])[0].value() if are_numbers(chosen[key]) else yaml.safe_load(text)
        if isinstance(value, list) != isinstance(chosen[key], list):
            kind = "a list, as [1,2]" if isinstance(chosen[key], list) else "one value"
            raise ConfigError(f"{key}={text}: {where} takes {kind} there")
        if are_numbers(chosen[key]) and not are_numbers(value):
            raise ConfigError(f"{key}={text}: {where} takes numbers there")
        chosen[key] = value
    return scale, chosen


def are_numbers(value: Any) -> bool:
    """Return whether a setting is a number, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in values)
