"""Checks of the values of a resolved config, before anything is built."""

from __future__ import annotations

import os
from typing import Any

from phantom.engine.artifacts import tracking
from phantom.engine.errors import ConfigError, as_config_error
from phantom.engine.machine.distributed import DEVICES
from phantom.engine.machine.precision import PRECISIONS
from phantom.engine.machine.speed import SPEEDS
from phantom.engine.tasks import Task
from phantom.report import CHOICES as ON_FAILURE
from phantom.validate import ANY, check_choice, check_count, check_flag, check_number

# root keys that hold one of a few words
CHOICES: dict[str, tuple[str | None, ...]] = {
    "precision": ("auto", *PRECISIONS),
    "speed": SPEEDS,
    "gradient_precision": (None, "bf16"),
    "device": DEVICES,
    "on_failure": ON_FAILURE,
    "wandb": tracking.MODES,
    "resume": ("auto", "never"),
}
# root keys that count something; the second may be null
COUNTS = ("epochs", "accumulate", "log_every", "keep_checkpoints", "smoke_steps", "repeats")
OPTIONAL_COUNTS = ("steps", "eval_every", "checkpoint_every", "subset", "test_subset")
SWITCHES = ("deterministic", "sync_batchnorm", "progress")
OPTIONAL_SWITCHES = ("compile", "cuda_graph")
TEXTS = ("runs", "wandb_project")
OPTIONAL_TEXTS = ("init", "continue_from")
OTHERS = ("seed", "ema", "target", "eval_splits")
KEYS = (*CHOICES, *COUNTS, *OPTIONAL_COUNTS, *SWITCHES, *OPTIONAL_SWITCHES, *TEXTS, *OPTIONAL_TEXTS, *OTHERS)


def check_root(config: dict[str, Any]) -> None:
    """Check the values of the root keys.

    Raises:
        ConfigError: names the key, the value got and what is allowed.
    """
    missing = [k for k in KEYS if k not in config]
    if missing:
        raise ConfigError(f"the config has no {', '.join(missing)}: it was written by another version of this program")
    with as_config_error():
        for key, allowed in CHOICES.items():
            check_choice(key, config[key], allowed)
        for key in COUNTS:
            check_count(key, config[key], least=1)
        for key in OPTIONAL_COUNTS:
            if config[key] is not None:
                check_count(key, config[key], least=1, also=" or null")
        variable = os.environ.get(tracking.VARIABLE)
        if variable and config["wandb"] != "disabled":
            check_choice(f"the environment's {tracking.VARIABLE}", variable, tracking.VARIABLE_MODES)
        check_count("seed", config["seed"], least=0)
        for key in SWITCHES:
            check_flag(key, config[key])
        for key in OPTIONAL_SWITCHES:
            if config[key] is not None:
                check_flag(key, config[key], also=", or null to let speed= decide")
        if config["ema"] is not None:
            check_number("ema", config["ema"], "(0, 1)", also=", or null for no average")
        if config["target"] is not None:
            check_number("target", config["target"], ANY, also=", or null to train to the end of the budget")
    for key in TEXTS:
        if not isinstance(config[key], str) or not config[key]:
            raise ConfigError(f"{key}={config[key]!r} must be a name")
    for key in OPTIONAL_TEXTS:
        if config[key] is not None and (not isinstance(config[key], str) or not config[key]):
            raise ConfigError(f"{key}={config[key]!r} must be a path or null")
    if config["init"] is not None and config["continue_from"] is not None:
        raise ConfigError(
            "init and continue_from exclude each other: the run that continue_from names has weights of its own"
        )
    splits = config["eval_splits"]
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
        raise ConfigError(f"eval_splits={splits!r} must be a list of splits of the data, such as [test]")


def obstacles_to_graphs(config: dict[str, Any], task: Task) -> list[str]:
    """Return what the config would have to say for steps of a fixed shape that never wait for the host, in words."""
    found = [f"{name}=null" for name in ("penalty", "jitter", "course") if config[name] is not None]
    found += ["accumulate=1"] if config["accumulate"] != 1 else []
    return found + ([] if task.fixed_shapes else [f"batches of a fixed shape, which {task.kind} does not have"])


def check_cuda_graph(config: dict[str, Any], task: Task) -> None:
    """Check that a training step can be a CUDA graph, where the config asks for one.

    Raises:
        ConfigError: names what to change.
    """
    if config["cuda_graph"] and (found := obstacles_to_graphs(config, task)):
        raise ConfigError(f"cuda_graph=true replays one fixed sequence of kernels: it needs {', '.join(found)}")


def check_rates(settings: dict[str, Any]) -> None:
    """Check the numbers of an optimiser's config that every optimiser shares.

    Raises:
        ConfigError: names the key and the value.
    """
    with as_config_error():
        for key in ("lr", "weight_decay", "eps"):
            check_number(f"optimizer.{key}", settings.get(key, 0.0), ">= 0")
        check_number(
            "optimizer.momentum", settings.get("momentum", 0.0), "[0, 1)", also=": an older step must count less"
        )
