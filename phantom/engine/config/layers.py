"""Layers: a recipe, an experiment and a scale each choose leaves and write numbers for the leaves they chose.

A later layer or the command line may put another leaf in their place: the numbers of the replaced leaf go with it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from phantom.engine.config.configs import LAYERS, Configs, plain
from phantom.engine.config.instantiate import locate
from phantom.engine.config.overrides import parse


class Layer(NamedTuple):
    """The numbers that one file writes, and the leaf of every group that it writes them for."""

    numbers: dict[str, Any]
    leaves: dict[str, str | None]


def drop_replaced(
    config: dict[str, Any], choices: dict[str, Any], overrides: Sequence[str], configs: Configs
) -> dict[str, Any]:
    """Return what Hydra merged, without the numbers that a layer wrote for another constructor than the chosen one.

    A number stays where both constructors inherit the argument from one class, because it means the same in both: the
    `max_steps` of a solver, the `batch_size` of images held in memory, but not the `lr` of an optimiser.

    Args:
        config: interpolations unresolved.
        choices: the chosen leaf of every group.
        overrides: the items of the command line; what they set stays.
    """
    layers = _layers(choices, configs)
    groups = [
        group for group in configs.groups if choices.get(group) is not None and isinstance(config.get(group), dict)
    ]
    replaced = [
        group
        for group in groups
        if any(group in layer.numbers and layer.leaves[group] not in (None, choices[group]) for layer in layers)
    ]
    return config | {
        group: _rebuilt(group, choices[group], layers, _typed(group, config[group], overrides), configs)
        for group in replaced
    }


def _rebuilt(group: str, name: str, layers: Sequence[Layer], typed: dict[str, Any], configs: Configs) -> dict[str, Any]:
    """Return the chosen leaf with the numbers of every layer that are meant for it, and with what was typed."""
    leaf = _leaf(group, name, configs)
    target = leaf.get("_target_")
    parts = [leaf]
    for numbers, leaves in layers:
        written, of = numbers.get(group) or {}, leaves[group]
        other = target if of is None else _leaf(group, of, configs).get("_target_")
        parts.append(written if other == target else {key: written[key] for key in _shared(other, target, written)})
    tree = OmegaConf.merge(*parts)
    for key, value in typed.items():
        OmegaConf.update(tree, key, value, merge=False)
    return plain(tree, resolve=False)


def _typed(group: str, node: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of a group's node that the command line sets, by their key in the node."""
    keys = [
        item.key_or_group.partition(".")[2] for item in parse(overrides) if item.key_or_group.startswith(f"{group}.")
    ]
    return {key: functools.reduce(operator.getitem, key.split("."), node) for key in keys}


def _layers(choices: dict[str, Any], configs: Configs) -> list[Layer]:
    """Return the layers that the choices name, from the weakest to the strongest."""
    leaves = dict(configs.groups)
    names = [(group, choices[group]) for group in LAYERS if choices.get(group) is not None]
    return [layer for group, name in names for layer in _files(group, name, leaves, configs)]


def _files(group: str, name: str, leaves: dict[str, str | None], configs: Configs) -> list[Layer]:
    """Return a file of a group between those of the same group that it starts from; update the chosen `leaves`."""
    body = configs.read(group, name)
    entries = body.pop("defaults", [])
    entries += [] if "_self_" in entries else ["_self_"]
    names = [entry for entry in entries if isinstance(entry, str)]
    layers = [layer for n in names for layer in ([None] if n == "_self_" else _files(group, n, leaves, configs))]
    for entry in entries:
        if isinstance(entry, dict):
            leaves |= {key.removeprefix("override ").removeprefix("/"): leaf for key, leaf in entry.items()}
    return [Layer(body, dict(leaves)) if layer is None else layer for layer in layers]


def _leaf(group: str, name: str, configs: Configs) -> dict[str, Any]:
    """Return a leaf with those of its group that it starts from."""
    parts = [layer.numbers for layer in _files(group, name, {}, configs)]
    body = plain(OmegaConf.merge(*parts), resolve=False)
    return body.get(group, body)  # a leaf of the package _global_ names its group


def _shared(one: str | None, other: str | None, keys: Iterable[str]) -> list[str]:
    """Return the keys that are arguments of the nearest class above both constructors."""
    classes = [locate(target) for target in (one, other) if target is not None]
    if len(classes) < 2 or not all(inspect.isclass(found) for found in classes):
        return []
    above = next(base for base in classes[0].__mro__ if base in classes[1].__mro__)
    inherited = {} if above is object else inspect.signature(above).parameters
    return [key for key in keys if key in inherited]
