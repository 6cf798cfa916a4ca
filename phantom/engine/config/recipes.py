"""Recipes: the settings of a pair of model and data, chosen by the pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phantom.engine.config.configs import Configs
from phantom.engine.config.overrides import parse


def canonical(overrides: Sequence[str], configs: Configs) -> list[str]:
    """Return the items in one spelling: `recipe=none` is `recipe=null`, and a pair's own recipe is not named."""
    own = recipe_of_pair(overrides, configs)
    kept = []
    for text, item in zip(overrides, parse(overrides), strict=True):
        named = item.key_or_group == "recipe" and not item.is_sweep_override()
        if named and own is not None and item.value() == own and not _has_experiment(overrides):
            continue
        kept.append("recipe=null" if named and item.value() == "none" else text)
    return kept


def with_recipe(overrides: Sequence[str], configs: Configs) -> list[str]:
    """Return the items, and the recipe of their pair where they name neither a recipe nor an experiment.

    An experiment names its recipe itself, or says everything.
    """
    own = recipe_of_pair(overrides, configs)
    named = "recipe" in _choices(overrides) or _has_experiment(overrides)
    return [*overrides, *([] if named or own is None else [f"recipe={own}"])]


def recipe_of_pair(overrides: Sequence[str], configs: Configs) -> str | None:
    """Return the recipe of the model and the data that the items choose; None where the pair has none."""
    chosen = _choices(overrides)
    name = "-".join(str(chosen.get(group, configs.groups.get(group))) for group in ("model", "data"))
    return name if name in configs.leaves("recipe") else None


def _has_experiment(overrides: Sequence[str]) -> bool:
    return _choices(overrides).get("experiment") is not None


def _choices(overrides: Sequence[str]) -> dict[str, Any]:
    items = [item for item in parse(overrides) if not item.is_sweep_override() and not item.is_delete()]
    return {item.key_or_group: item.value() for item in items}
