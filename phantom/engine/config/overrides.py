"""The `key=value` items of a command line: parsed, expanded into the jobs of a sweep, applied to a saved config."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phantom.engine.config.configs import ESTIMATOR_KEYS, Configs, nearest, plain
from phantom.engine.errors import ConfigError, first_line

ANY = "++"  # Hydra's mark of a key that need not be there
# root keys that a data set's leaf repeats; a saved config has their values in both places
OF_DATA = ("subset", "test_subset")
# keys that hold a path, which is taken as it is typed: Hydra's grammar has no umlauts and no brackets in a name
PATHS = ("runs", "data.root", "data.cache", "init", "continue_from")


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return the parsed items; a path is taken as it is typed. A comma separates jobs, unless such a path is there.

    Raises:
        ConfigError: an item is not of the form key=value, or its value needs quotes.
    """
    parser = OverridesParser.create()
    return [_parse(parser, line) for line in overrides]


def _parse(parser: OverridesParser, line: str) -> Override:
    try:
        item = parser.parse_override(_as_typed(line))
    except HydraException as error:
        key, equals, value = line.partition("=")
        if not equals:
            raise ConfigError(f"{line!r} is no override: {first_line(error)}; write overrides as key=value") from error
        raise ConfigError(
            f"{line!r} cannot be read ({first_line(error)}): write overrides as key=value, and a value of other "
            f"characters than letters, digits and _-/.:+@%*? in two pairs of quotes, {_quoted(key, value)!r}"
        ) from error
    if not item.key_or_group:
        raise ConfigError(f"{line!r} names no key; write overrides as key=value")
    return item


def _as_typed(line: str) -> str:
    """Return the item with its path in quotes, unless it is more than a path: null, quoted, or with a reference."""
    key, _, value = line.partition("=")
    if key not in PATHS or value in ("", "null") or value[0] in "'\"" or "${" in value:
        return line
    # the folders of runs have commas in their names, and equals signs, which no value of a sweep has
    there = "=" in value or any(path and Path(path).expanduser().exists() for path in (value, value.partition(":")[2]))
    return line if "," in value and not there else _quoted(key, value)


def _quoted(key: str, value: str) -> str:
    # in Hydra's quotes a backslash counts only before a quote, or at the end
    body = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ("\\" if found[2] else "") + found[2], value)
    return f'{key}="{body}"'


def given_keys(overrides: Sequence[str]) -> set[str]:
    """Return the root keys that the items set, or reach into."""
    return {item.key_or_group.split(".")[0] for item in parse(overrides)}


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep: the product of all comma-separated choices.

    Raises:
        ConfigError: an item is not of the form key=value.
    """
    options = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [text]  # as it was typed: a job has the folder of the same run on its own
        for text, item in zip(overrides, parse(overrides), strict=True)
    ]
    return [list(job) for job in itertools.product(*options)]


def check_overrides(overrides: Sequence[str], configs: Configs) -> None:
    """Reject sweeps, deletions and unknown leaves before Hydra does, so that the user sees our message.

    Raises:
        ConfigError: names the item and what is allowed.
    """
    for item in parse(overrides):
        if item.is_sweep_override():
            hint = f"; a comma of a name goes in two pairs of quotes, {_quoted(*str(item.input_line).split('=', 1))!r}"
            more = hint if item.key_or_group in PATHS else ""
            raise ConfigError(f"{item.input_line} has several values: add -m to run them all, or keep one{more}")
        if item.is_delete():
            raise ConfigError(f"{item.input_line} deletes a key: write {item.key_or_group}=null to have none of it")
        if item.key_or_group in configs.groups:
            _check_leaf(item.key_or_group, item.value(), configs)


def to_hydra(overrides: Sequence[str], configs: Configs) -> list[str]:
    """Return the items in Hydra's words: `~group` for `group=null`, `++k=3` for a key that train.yaml does not have.

    Raises:
        ConfigError: null is one of several values of a group, which Hydra cannot sweep.
    """
    items = []
    for item in parse(overrides):
        group, line = item.key_or_group, item.input_line
        if group in configs.groups and item.is_sweep_override() and "null" in item.sweep_string_iterator():
            raise ConfigError(f"{line}: null cannot be one of several leaves; run {group}=null on its own")
        if group in configs.groups and _is_null(item):
            line = f"~{group}"
        elif group in ESTIMATOR_KEYS and item.get_key_element() == group:
            line = f"{ANY}{line}"
        items.append(line)
    return items


def _is_null(item: Override) -> bool:
    return not item.is_sweep_override() and not item.is_delete() and item.value() is None


def _check_leaf(group: str, leaf: Any, configs: Configs) -> None:
    valid, optional = configs.leaves(group), configs.groups[group] is None
    if leaf in valid or (leaf is None and optional):
        return
    near = nearest(str(leaf), valid)
    folders = sorted({name.rpartition("/")[0] for name in valid})
    folder = str(leaf).rpartition("/")[0]
    if folders != [""]:  # too many to list: those of the folder named, or the folders
        valid = [name for name in valid if name.startswith(f"{folder}/")] if folder in folders else folders
    names = ", ".join([*valid, "null"] if optional else valid)
    raise ConfigError(f"{group}={'null' if leaf is None else leaf} is not known{near} Choose one of {names}")


def change(config: dict[str, Any], overrides: Sequence[str], configs: Configs) -> dict[str, Any]:
    """Return a saved config with key=value items applied; every key must exist in it.

    Raises:
        ConfigError: an unknown key, a whole group, or a value that cannot be parsed.
    """
    if config["eval_solver"] is None and any(item.startswith("eval_solver.") for item in overrides):
        config["eval_solver"] = dict(config["solver"])
    tree, defaults = OmegaConf.create(config), configs.groups
    OmegaConf.set_struct(tree, True)
    for item, override in zip(overrides, parse(overrides), strict=True):
        key, value = override.key_or_group, override.value()
        if key in defaults and not (isinstance(value, dict) or (value is None and defaults[key] is None)):
            raise ConfigError(f"{item!r}: a trained run keeps its {key}; change its keys, as in {key}.<key>=<value>")
        if key in OF_DATA and key not in tree.data:
            raise ConfigError(f"{item!r} changes nothing: the data of this run take no {key}")
        try:
            OmegaConf.update(tree, key, value)
            if key in OF_DATA:
                OmegaConf.update(tree, f"data.{key}", value)
        except OmegaConfBaseException as error:
            parent = OmegaConf.select(tree, key.rpartition(".")[0]) if "." in key else tree
            valid = ", ".join(sorted(map(str, parent))) if OmegaConf.is_dict(parent) else "none"
            raise ConfigError(f"{item!r} does not fit the run's config; valid keys there: {valid}") from error
    return plain(tree, resolve=False)
