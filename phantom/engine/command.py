"""The command line of train.py: Hydra, with every mistake answered by one message before any work starts."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phantom.engine import build
from phantom.engine.config import values
from phantom.engine.config.compatibility import check_pair
from phantom.engine.config.instantiate import instantiate, resolve
from phantom.engine.config.overrides import (
    change,
    check_overrides,
    expand,
    from_hydra,
    groups,
    parse,
    root_keys,
    to_hydra,
)
from phantom.engine.config.values import CONFIGS
from phantom.engine.errors import CheckpointError, ConfigError, DataError, DivergenceError

__all__ = ["CONFIGS", "change", "expand"]

# what a machine says of its disks and folders, and no defect of the program
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK = (
    *(*FULL, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


def compose(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (resolved config, choices of every group) for a list of `key=value` items without sweeps.

    Raises:
        ConfigError: an unknown key or group option, or a key the chosen estimator does not use.
    """
    check_overrides(overrides)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            cfg = hydra.compose("train", overrides=to_hydra(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explain(error, overrides)) from error
    choices = _choices(cfg.hydra.runtime.choices)
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra
    return check(cfg, overrides), choices


def check(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved config after the checks that need no data: keys, the pair, every cheap constructor."""
    used = str(OmegaConf.to_container(cfg, resolve=False)["grad"])
    config = resolve(cfg)
    unknown = [key for key in config if key not in root_keys()]
    if unknown:
        near = values.nearest(unknown[0], sorted(root_keys()))
        raise ConfigError(f"unknown key {', '.join(unknown)}{near} Valid keys: {', '.join(sorted(root_keys()))}")
    given = {item.key_or_group.split(".")[0] for item in parse(overrides)}
    for key in (*values.ESTIMATOR_KEYS, "adjoint_solver"):
        if key in given and f"${{{key}}}" not in used:
            raise ConfigError(_unused(key))
    values.check_root(config)
    values.check_cuda_graph(config, check_pair(config))
    build.build_rules(config, build.build_deq(config))
    build.build_optimizer(config, [torch.nn.Parameter(torch.zeros(2, 2))])
    for name in ("schedule", "clipping", "monitor"):
        instantiate(config[name], name)
    return config


def run_hydra(job: Callable[[dict[str, Any], list[str], dict[str, Any]], Any]) -> None:
    """Check the whole command line, every job of a sweep included, then run `job(config, overrides, choices)`."""
    arguments = sys.argv[1:]
    failed = []

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
    def main(cfg: DictConfig) -> None:
        overrides = from_hydra(HydraConfig.get().overrides.task)
        choices = _choices(HydraConfig.get().runtime.choices)
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        cfg.pop("hydra", None)
        try:
            job(check(cfg, overrides), overrides, choices)
        except Exception as error:
            if not is_user_error(error):
                raise
            failed.append(str(error))
            print(f"error: {message_of(error)}", file=sys.stderr, flush=True)
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                # the other processes may be waiting for this one: with it, the launcher ends them
                sys.exit(1)

    flags = [argument for argument in arguments if argument.startswith("-")]
    if set(flags) <= {"-m", "--multirun"}:
        items = [argument for argument in arguments if argument not in flags]
        try:
            for overrides in expand(items) if flags else [items]:
                _make_folder(Path(compose(overrides)[0]["runs"]))
            sys.argv[1:] = [*flags, *to_hydra(items)]
        except (ConfigError, OSError) as error:
            # every process finds the same mistake
            sys.exit(1 if int(os.environ.get("RANK", "0")) > 0 else f"error: {message_of(error)}")
    main()
    if failed:
        sys.exit(1)


def is_user_error(error: Exception) -> bool:
    """Return whether the message alone tells the user what to do."""
    return isinstance(error, (ConfigError, DataError, CheckpointError, DivergenceError)) or _of_disk(error) is not None


def message_of(error: Exception) -> str:
    """Return what a user is told: one line, without a traceback."""
    found = _of_disk(error)
    if found is None:
        return str(error)
    return (
        f"{found.filename or 'writing failed'}: {found.strerror}. Free some space, correct the permissions, or name "
        "another folder with runs=<folder>; what was saved before is kept"
    )


def _of_disk(error: Exception) -> OSError | None:
    """Return the error of a disk or folder that this one is, or that torch turned into another one while writing."""
    if isinstance(error, OSError):
        return error if error.errno in DISK else None
    cause = error.__context__
    return cause if isinstance(cause, OSError) and cause.errno in FULL else None


def _make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _choices(choices: DictConfig) -> dict[str, Any]:
    """Return the chosen leaf of every group of ours; Hydra's own groups say nothing about a run."""
    return {group: leaf for group, leaf in sorted(choices.items()) if not group.startswith("hydra/")}


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if found is None:
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    key = found.group(1)
    if key in values.ESTIMATOR_KEYS:
        return _unused(key)
    parent, _, name = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    others = [item for item in overrides if not item.lstrip("+~").startswith(f"{key}=")]
    valid = sorted(_valid_keys(parent, others))
    if not valid and parent in groups():
        return f"{key} is given, but {parent} is null: choose one first, {parent}={'|'.join(values.leaves(parent))}"
    where = f"of {parent}" if parent else "here"
    return f"unknown key {key}{values.nearest(name, valid, prefix)} Valid keys {where}: {', '.join(valid)}"


def _valid_keys(parent: str, overrides: Sequence[str]) -> list[str]:
    if not parent:
        return list(root_keys())
    # leave the dotted overrides out: another of them may be the next mistake
    kept = [item for item in overrides if "." not in item.split("=")[0]]
    try:
        node = OmegaConf.select(hydra.compose("train", overrides=to_hydra(kept)), parent)
    except (HydraException, OmegaConfBaseException):
        node = None
    return [key for key in node if not key.startswith("_")] if isinstance(node, DictConfig) else []


def _unused(key: str) -> str:
    users = [leaf for leaf in values.leaves("grad") if f"${{{key}}}" in (CONFIGS / "grad" / f"{leaf}.yaml").read_text()]
    return f"{key} is not used by the chosen gradient estimator: it belongs to grad={'|'.join(users)}; leave {key} out"
