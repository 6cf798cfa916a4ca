"""Configs that earlier versions saved: names that moved since, and keys that did not exist yet."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import yaml

from phantom.engine.errors import ConfigError, first_line

# module of a `_target_` then: module now
MOVED = {
    **{f"data.{name}": f"data.graphs.{name}" for name in ("chains", "ppi", "ppi_synthetic", "tu")},
    **{f"data.{name}": f"data.images.{name}" for name in ("cifar10", "digits", "imagenet")},
    **{f"data.{name}": f"data.text.{name}" for name in ("pydocs", "wikitext")},
    "models.ignn_layers": "models.ignn.layers",
    "models.mdeq_cell": "models.mdeq.cell",
    "models.transformer_cell": "models.deq_transformer.cell",
    "phantom.engine.monitor": "phantom.engine.measure.monitor",
    "phantom.engine.optim": "phantom.engine.training.clipping",
    "phantom.engine.rules": "phantom.engine.training.rules",
    "phantom.engine.schedule": "phantom.engine.training.schedule",
}
# the one-step gradient was NPG with these numbers in its leaf, and without k and lam at the root
ONE_STEP = {"_target_": "phantom.NPG", "k": 1, "lam": 1.0}
# arguments that a constructor has gained, with what it did before
GAINED: dict[str, dict[str, Any]] = {
    "data.text.wikitext.WikiText103": {"eval_tokens": None},
    "data.images.imagenet.ImageNet": {"streaming": False, "shuffle_buffer": 1000},
    "phantom.Broyden": {"kernels": False},
    "phantom.engine.training.rules.Penalty": {"of_steps": None},
}
# far more than any run saves
MOST, DEEPEST = 100_000, 50


def upgrade(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved config in the words of this version.

    Args:
        defaults: root keys with their default values, which a config from before they existed is given.
    """
    found = {**defaults, **_renamed(dict(config))}
    if found.get("grad") == ONE_STEP and "k" not in found:
        found["grad"] = {"_target_": "phantom.OneStep"}
    return found


def read(text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that was saved as YAML in the words of this version.

    Args:
        defaults: see `upgrade`.

    Raises:
        ConfigError: the text is damaged.
    """
    try:
        found = yaml.safe_load(text)
    # a date that does not exist is a ValueError; `!!bool x`, `!!int ''` and `!!timestamp x` are the others
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the saved config is no YAML ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"the saved config is a {type(found).__name__}, expected a mapping")
    _check_size(found)
    return upgrade(found, defaults)


def _check_size(config: dict[Any, Any]) -> None:
    """Raise ConfigError where a config has no end: an alias of YAML may name what it is in, or multiply its like."""
    nodes: list[tuple[Any, int]] = [(config, 0)]
    for count in itertools.count():
        if not nodes:
            return
        node, depth = nodes.pop()
        if count == MOST or depth == DEEPEST:
            raise ConfigError(f"the saved config is more than {MOST} values, or {DEEPEST} levels: no run saves that")
        items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        nodes += [(item, depth + 1) for item in items]


def _renamed(node: Any) -> Any:
    if isinstance(node, dict):
        found = {key: _moved(value) if key == "_target_" else _renamed(value) for key, value in node.items()}
        return GAINED.get(str(found.get("_target_")), {}) | found
    return [_renamed(value) for value in node] if isinstance(node, list) else node


def _moved(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else target
