"""From `key=value` items to a resolved config of plain values, with every mistake in one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phantom.engine.config.configs import ESTIMATOR_KEYS, Configs, nearest, plain
from phantom.engine.config.instantiate import parameters_of
from phantom.engine.config.layers import drop_replaced
from phantom.engine.config.overrides import OF_DATA, check_overrides, given_keys, to_hydra
from phantom.engine.config.recipes import with_recipe
from phantom.engine.errors import ConfigError, first_line

# groups without a default leaf: absent from the config unless chosen
OPTIONAL = ("eval_solver", "clipping", "pretraining", "penalty", "jitter", "course", "monitor")
# root keys that only some estimators use, and the constructor argument that each of them fills
FILLS = {**{key: key for key in ESTIMATOR_KEYS}, "adjoint_solver": "solver"}


def compose(overrides: Sequence[str], configs: Configs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (resolved config, chosen leaf of every group) for `key=value` items without sweeps.

    Raises:
        ConfigError: an unknown key or leaf, a value that is missing, or a key the chosen estimator does not use.
    """
    check_overrides(overrides, configs)
    items = with_recipe(overrides, configs)
    try:
        tree = configs.compose(to_hydra(items, configs))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, items, configs)) from error
    choices = _choices_of(tree.hydra.runtime.choices)
    return _resolve(tree, choices, overrides, configs), choices


def _choices_of(choices: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the chosen leaf of every group of ours; Hydra's own groups say nothing about a run."""
    return {str(group): leaf for group, leaf in sorted(choices.items()) if not str(group).startswith("hydra/")}


def _resolve(tree: DictConfig, choices: dict[str, Any], overrides: Sequence[str], configs: Configs) -> dict[str, Any]:
    """Return what Hydra composed as plain values.

    `k` and `lam` fill the estimator's arguments of these names, whether its leaf refers to them (`${k}`) or holds
    numbers of its own. They leave the config where an experiment pinned them for an estimator that was then replaced.

    Raises:
        ConfigError: a missing value, an unknown root key, or a key that the chosen estimator does not use.
    """
    container = plain(tree, resolve=False)
    container.pop("hydra", None)
    container = drop_replaced(container, choices, overrides, configs)
    try:
        config = plain(OmegaConf.create(container), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    # `pretraining=null` on top of an experiment leaves the experiment's numbers without a constructor: that is None too
    config |= {key: None for key in OPTIONAL if "_target_" not in (config.get(key) or {})}
    unknown = [key for key in config if key not in configs.root_keys]
    if unknown:
        near = nearest(unknown[0], sorted(configs.root_keys))
        raise ConfigError(f"unknown key {', '.join(unknown)}{near} Valid keys: {', '.join(sorted(configs.root_keys))}")
    _fill_estimator(config, given_keys(overrides), configs)
    _check_used(config, given_keys(overrides))
    return config


def _check_used(config: dict[str, Any], given: set[str]) -> None:
    for key in OF_DATA:
        if key in given and key not in config["data"]:
            raise ConfigError(f"{key} is not used: the chosen data take no {key}; leave it out")
    if "smoke_steps" in given and config["scale"] != "smoke":
        raise ConfigError(f"smoke_steps is not used at scale={config['scale']}: add scale=smoke, or use steps")


def _fill_estimator(config: dict[str, Any], given: set[str], configs: Configs) -> None:
    grad = config["grad"]
    takes = parameters_of(grad["_target_"])
    for key, argument in FILLS.items():
        if key in given and argument not in takes:
            users = "|".join(_users(argument, configs))
            raise ConfigError(
                f"{key} is not used by the chosen gradient estimator: it belongs to grad={users}; leave {key} out"
            )
    for key in ESTIMATOR_KEYS:
        if key in given:
            grad[key] = config[key]
        elif key in config and grad.get(key) != config[key]:
            del config[key]


def _users(argument: str, configs: Configs) -> list[str]:
    """Return the estimators that take an argument, those that take most of these arguments first."""
    leaves = {leaf: configs.read("grad", leaf) for leaf in configs.leaves("grad")}
    takes = {leaf: parameters_of(node.get("grad", node)["_target_"]) for leaf, node in leaves.items()}
    users = [leaf for leaf in leaves if argument in takes[leaf]]
    return sorted(users, key=lambda leaf: (-len(takes[leaf] & set(FILLS.values())), leaf))


def _explain(error: Exception, overrides: Sequence[str], configs: Configs) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if found is None:
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    key = found.group(1)
    parent, _, name = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    others = [item for item in overrides if not item.lstrip("+~").startswith(f"{key}=")]
    valid = sorted(_valid_keys(parent, others, configs))
    if not valid and parent in configs.groups:
        return f"{key} is given, but {parent} is null: choose one first, {parent}={'|'.join(configs.leaves(parent))}"
    inner = re.search(r"Key '([^']+)' is not in struct", text)
    if name in valid and inner:
        leaf = f"configs/{parent.split('.')[0]}/<name>.yaml" if parent else "a leaf"
        return (
            f"unknown key {key}.{inner.group(1)}: a mapping here changes keys that exist; write {leaf} for other ones"
        )
    where = f"of {parent}" if parent else "here"
    return f"unknown key {key}{nearest(name, valid, prefix)} Valid keys {where}: {', '.join(valid)}"


def _valid_keys(parent: str, overrides: Sequence[str], configs: Configs) -> list[str]:
    if not parent:
        return list(configs.root_keys)
    # leave the dotted overrides out: another of them may be the next mistake
    kept = [item for item in overrides if "." not in item.split("=")[0]]
    try:
        node = OmegaConf.select(configs.compose(to_hydra(kept, configs)), parent)
    except (HydraException, OmegaConfBaseException):
        node = None
    return [str(key) for key in node if not str(key).startswith("_")] if isinstance(node, DictConfig) else []
