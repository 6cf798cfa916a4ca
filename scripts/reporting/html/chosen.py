"""What a record was made with: model, data, estimator, k, lam and scale, to filter by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts import studies

GROUPS = ("model", "data", "grad")
NUMBERS = ("k", "lam")
KEYS = (*GROUPS, *NUMBERS)


def chosen(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what is known of a record by the names of `KEYS` and `scale`, as text; -- for what it does not have."""
    label = record.get("experiment") or str(record.get("label", "")).split("@")[0]
    experiment = _of_leaf("experiment", label)
    found = _of_leaf("recipe", record.get("recipe") or experiment.get("recipe")) | experiment
    found |= {group: leaf for group, leaf in record.get("choices", {}).items() if group in GROUPS}
    found |= _of_items(record.get("overrides", ()))
    takes = studies.leaf("grad", found["grad"]) if "grad" in found else {}
    varied = _of_course(record, found.get("course"))
    numbers = {key: found.get(key, takes[key]) for key in NUMBERS if key in takes and key not in varied}
    shown = {**{group: found.get(group) for group in GROUPS}, **numbers, "scale": record.get("scale", "paper")}
    return {key: "--" if shown.get(key) is None else _text(shown[key]) for key in (*KEYS, "scale")}


def _of_leaf(group: str, leaf: str | None) -> dict[str, Any]:
    """Return what a recipe or an experiment says, over those that it starts from; nothing for another label."""
    node = studies.leaf(group, leaf) if leaf else {}
    found: dict[str, Any] = {}
    for entry in node.get("defaults", ()):
        if isinstance(entry, dict):
            found |= {key.removeprefix("override /"): value for key, value in entry.items()}
        elif entry != "_self_":
            found |= _of_leaf(group, entry)
    return found | {key: node[key] for key in NUMBERS if key in node}


def _of_items(items: Sequence[str]) -> dict[str, str]:
    """Return what the items choose; the estimator's own grad.k counts, wherever it stands, and not the root key."""
    pairs = _pairs(items)
    own = {key: pairs[f"grad.{key}"] for key in NUMBERS if f"grad.{key}" in pairs}
    return {key: value for key, value in pairs.items() if key in KEYS} | own


def _of_course(record: Mapping[str, Any], leaf: str | None) -> set[str]:
    """Return which numbers a course changes as the run goes on, so that it has no one value of them.

    Args:
        leaf: that of the experiment.
    """
    pairs = _pairs(record.get("overrides", ()))
    leaf = pairs.get("course", record.get("choices", {}).get("course", leaf))
    course = studies.leaf("course", leaf) if leaf else {}
    return {key for key in NUMBERS if pairs.get(f"course.{key}", course.get(key)) not in (None, "null")}


def _pairs(items: Sequence[str]) -> dict[str, str]:
    return {key: value for key, equals, value in (item.lstrip("+").partition("=") for item in items) if equals}


def _text(value: Any) -> str:
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)
