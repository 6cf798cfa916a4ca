"""What a record was made with: model, data, estimator, k, lam and scale, to filter by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts import studies

GROUPS = ("model", "data", "grad")
KEYS = (*GROUPS, "k", "lam")


def chosen(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what is known of a record by the names of `KEYS` and `scale`, as text; -- for what it does not have."""
    found: dict[str, Any] = {}
    label = record.get("experiment") or str(record.get("label", "")).split("@")[0]
    for group, leaf in (("recipe", record.get("recipe")), ("experiment", label)):
        found |= _of_leaf(group, leaf)
    found |= {group: leaf for group, leaf in record.get("choices", {}).items() if group in GROUPS}
    found |= _of_items(record.get("overrides", ()))
    takes = studies.leaf("grad", found["grad"]) if "grad" in found else {}
    numbers = {key: found.get(key, takes[key]) for key in ("k", "lam") if key in takes}
    shown = {**{group: found.get(group) for group in GROUPS}, **numbers, "scale": record.get("scale", "paper")}
    return {key: "--" if shown.get(key) is None else _text(shown[key]) for key in (*KEYS, "scale")}


def _of_leaf(group: str, leaf: str | None) -> dict[str, Any]:
    """Return what a recipe or an experiment chooses, after the recipe that it stands on; nothing for another label."""
    if not leaf:
        return {}
    node = studies.leaf(group, leaf)
    choices = {
        key.removeprefix("override /"): value
        for entry in node.get("defaults", ())
        if isinstance(entry, dict)
        for key, value in entry.items()
    }
    below = _of_leaf("recipe", choices.get("recipe"))
    return below | {
        key: value for key, value in {**node, **choices}.items() if key in KEYS and isinstance(value, (str, int, float))
    }


def _of_items(items: Sequence[str]) -> dict[str, str]:
    pairs = (item.lstrip("+").split("=", 1) for item in items if "=" in item)
    return {key: value for key, value in pairs if key in KEYS}


def _text(value: Any) -> str:
    try:
        return f"{float(value):g}"
    except ValueError:
        return str(value)
