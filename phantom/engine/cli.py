"""The command line of train.py: Hydra, with every mistake answered by one message before any work starts."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phantom.engine import build
from phantom.engine.checkpoint import CheckpointError
from phantom.engine.loop import DivergenceError

CONFIGS = Path(__file__).parents[2] / "configs"


def compose(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (resolved config, choices of every group) for a list of `key=value` items without sweeps.

    Raises:
        ConfigError: an unknown key or group option, or a key the chosen estimator does not use.
    """
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            cfg = hydra.compose("train", overrides=list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise build.ConfigError(_explain(error, overrides)) from error
    choices = _choices(cfg.hydra.runtime.choices)
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra
    return check(cfg, overrides), choices


def check(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved config after the checks that need no data: keys, the pair, every cheap constructor."""
    config = build.resolve(cfg)
    unknown = [key for key in config if key not in _root_keys()]
    if unknown:
        raise build.ConfigError(f"unknown key {', '.join(unknown)}; valid keys: {', '.join(sorted(_root_keys()))}")
    for key in build.ESTIMATOR_KEYS:
        if key not in config and any(item.lstrip("+").startswith(f"{key}=") for item in overrides):
            raise build.ConfigError(_unused(key))
    build.check_root(config)
    build.check_pair(config)
    build.build_rules(config, build.build_deq(config))
    for name in ("schedule", "clipping", "monitor"):
        build.instantiate(config[name], name)
    return config


def change(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a saved config with key=value items applied; every key must exist in it.

    Raises:
        ConfigError: an unknown key, or a value that cannot be parsed.
    """
    if config["eval_solver"] is None and any(item.startswith("eval_solver.") for item in overrides):
        config["eval_solver"] = dict(config["solver"])
    tree = OmegaConf.create(config)
    OmegaConf.set_struct(tree, True)
    for item, override in zip(overrides, _parse(overrides), strict=True):
        key = override.key_or_group
        try:
            OmegaConf.update(tree, key, override.value())
        except OmegaConfBaseException as error:
            parent = OmegaConf.select(tree, key.rpartition(".")[0]) if "." in key else tree
            valid = ", ".join(sorted(map(str, parent))) if OmegaConf.is_dict(parent) else "none"
            raise build.ConfigError(f"{item!r} does not fit the run's config; valid keys there: {valid}") from error
    return OmegaConf.to_container(tree)


def run_hydra(job: Callable[[dict[str, Any], list[str], dict[str, Any]], Any]) -> None:
    """Check the whole command line, every job of a sweep included, then run `job(config, overrides, choices)`."""
    arguments = sys.argv[1:]
    failed = []

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
    def main(cfg: DictConfig) -> None:
        overrides = list(HydraConfig.get().overrides.task)
        choices = _choices(HydraConfig.get().runtime.choices)
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        cfg.pop("hydra", None)
        try:
            job(check(cfg, overrides), overrides, choices)
        except Exception as error:
            if not is_user_error(error):
                raise
            failed.append(str(error))
            print(f"error: {error}", file=sys.stderr)

    if not any(argument.startswith("-") and argument not in ("-m", "--multirun") for argument in arguments):
        try:
            for overrides in expand([item for item in arguments if not item.startswith("-")]):
                compose(overrides)
        except build.ConfigError as error:
            sys.exit(f"error: {error}")
    main()
    if failed:
        sys.exit(1)


def is_user_error(error: Exception) -> bool:
    """Return whether the message alone tells the user what to do."""
    return isinstance(error, (build.ConfigError, build.DataError, CheckpointError, DivergenceError))


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep: the product of all comma-separated choices.

    Raises:
        ConfigError: an item is not of the form key=value.
    """
    options = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [item.input_line]
        for item in _parse(overrides)
    ]
    return [list(job) for job in itertools.product(*options)]


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides=list(overrides))
    except HydraException as error:
        raise build.ConfigError(f"{str(error).splitlines()[0]}; write overrides as key=value") from error


def _choices(choices: DictConfig) -> dict[str, Any]:
    """Return the chosen leaf of every group of ours; Hydra's own groups say nothing about a run."""
    return {group: leaf for group, leaf in sorted(choices.items()) if not group.startswith("hydra/")}


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if found is None:
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    key = found.group(1)
    if key in build.ESTIMATOR_KEYS:
        return _unused(key)
    parent, _, name = key.rpartition(".")
    valid = _valid_keys(parent, [item for item in overrides if not item.lstrip("+~").startswith(f"{key}=")])
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"; did you mean {parent + '.' if parent else ''}{near[0]}?" if near else ""
    return (
        f"unknown key {key}{hint or '.'} Valid keys {f'of {parent}' if parent else 'here'}: {', '.join(sorted(valid))}"
    )


def _valid_keys(parent: str, overrides: Sequence[str]) -> list[str]:
    if not parent:
        return list(_root_keys())
    # leave the dotted overrides out: another of them may be the next mistake
    kept = [item for item in overrides if "." not in item.split("=")[0]]
    try:
        node = OmegaConf.select(hydra.compose("train", overrides=kept), parent)
    except (HydraException, OmegaConfBaseException):
        node = None
    return [key for key in node if not key.startswith("_")] if isinstance(node, DictConfig) else []


def _unused(key: str) -> str:
    users = [path.stem for path in sorted((CONFIGS / "grad").glob("*.yaml")) if f"${{{key}}}" in path.read_text()]
    return f"{key} is not used by the chosen gradient estimator: it belongs to grad={'|'.join(users)}; leave {key} out"


def _root_keys() -> set[str]:
    root = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"), resolve=False)
    groups = {key for item in root.pop("defaults") if isinstance(item, dict) for key in item if " " not in key}
    root.pop("hydra")
    return (set(root) | groups | set(build.ESTIMATOR_KEYS)) - {"experiment"}
