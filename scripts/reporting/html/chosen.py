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
    numbers = {key: found.get(key, takes[key]) for key in NUMBERS if key in takes}
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
    pairs = (item.lstrip("+").split("=", 1) for item in items if "=" in item)
    return {key: value for key, value in pairs if key in KEYS}


def _text(value: Any) -> str:
    try:
        return f"{float(value):g}"
    except ValueError:
        return str(value)
