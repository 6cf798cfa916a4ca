"""Checks of the values of a resolved config, before anything is built."""

from __future__ import annotations

import math
from typing import Any

from phantom.engine.artifacts.tracking import MODES
from phantom.engine.errors import ConfigError
from phantom.engine.machine.distributed import DEVICES
from phantom.engine.machine.precision import PRECISIONS
from phantom.engine.tasks import Task
from phantom.validate import is_number

# root keys that hold one of a few words
CHOICES: dict[str, tuple[str | None, ...]] = {
    "precision": PRECISIONS,
    "gradient_precision": (None, "bf16"),
    "device": DEVICES,
    "wandb": MODES,
    "resume": ("auto", "never"),
}
# root keys that count something; the second may be null
COUNTS = ("epochs", "accumulate", "log_every", "smoke_steps", "repeats")
OPTIONAL_COUNTS = ("steps", "eval_every", "checkpoint_every", "subset", "test_subset")
SWITCHES = ("compile", "cuda_graph", "deterministic", "sync_batchnorm", "progress")
TEXTS = ("runs", "wandb_project")
OTHERS = ("seed", "ema", "eval_splits")


def check_root(config: dict[str, Any]) -> None:
    """Check the values of the root keys.

    Raises:
        ConfigError: names the key, the value got and what is allowed.
    """
    missing = [k for k in (*CHOICES, *COUNTS, *OPTIONAL_COUNTS, *SWITCHES, *TEXTS, *OTHERS) if k not in config]
    if missing:
        raise ConfigError(f"the config has no {', '.join(missing)}: it was written by another version of this program")
    for key, allowed in CHOICES.items():
        if config[key] not in allowed:
            names = ", ".join("null" if value is None else value for value in allowed)
            raise ConfigError(f"{key}={config[key]!r} is not known; choose one of {names}")
    for key in COUNTS:
        _check_integer(key, config[key], least=1)
    for key in OPTIONAL_COUNTS:
        if config[key] is not None:
            _check_integer(key, config[key], least=1, otherwise=" or null")
    _check_integer("seed", config["seed"], least=0)
    for key in SWITCHES:
        if not isinstance(config[key], bool):
            raise ConfigError(f"{key}={config[key]!r} must be true or false")
    for key in TEXTS:
        if not isinstance(config[key], str) or not config[key]:
            raise ConfigError(f"{key}={config[key]!r} must be a name")
    ema = config["ema"]
    if ema is not None and not (is_number(ema) and 0 < ema < 1):
        raise ConfigError(f"ema={ema!r} must be in (0, 1), or null for no average")
    splits = config["eval_splits"]
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
        raise ConfigError(f"eval_splits={splits!r} must be a list of splits of the data, such as [test]")


def check_cuda_graph(config: dict[str, Any], task: Task) -> None:
    """Check that a training step has fixed shapes and never waits for the host, where the config asks for a graph.

    Raises:
        ConfigError: names what to change.
    """
    if not config["cuda_graph"]:
        return
    solvers = {"solver": config["solver"], "adjoint_solver": config["grad"].get("solver")}
    unbounded = [name for name, solver in solvers.items() if solver is not None and solver["tol"] is not None]
    problems = [f"{name}.tol=null (a fixed budget)" for name in unbounded]
    problems += [f"{name}=null" for name in ("penalty", "jitter") if config[name] is not None]
    problems += ["accumulate=1"] if config["accumulate"] != 1 else []
    if problems:
        raise ConfigError(f"cuda_graph=true replays one fixed sequence of kernels: it needs {', '.join(problems)}")
    if not task.fixed_shapes:
        raise ConfigError(f"cuda_graph=true needs batches of a fixed shape, which {task.kind} does not have")


def check_rates(settings: dict[str, Any]) -> None:
    """Check the numbers of an optimiser's config that every optimiser shares.

    Raises:
        ConfigError: names the key and the value.
    """
    for key in ("lr", "weight_decay", "momentum", "eps"):
        value = settings.get(key, 0.0)
        if not (is_number(value) and math.isfinite(value) and value >= 0):
            raise ConfigError(f"optimizer.{key}={value!r} must be a number >= 0")
    momentum = settings.get("momentum", 0.0)
    if momentum >= 1:
        raise ConfigError(f"optimizer.momentum={momentum!r} must be in [0, 1): past steps must fade")


def _check_integer(key: str, value: Any, *, least: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}={value!r} must be an integer >= {least}{otherwise}")
