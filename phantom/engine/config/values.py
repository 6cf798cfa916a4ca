"""Checks of the values of a resolved config, before anything is built."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from phantom.engine.artifacts import tracking
from phantom.engine.errors import ConfigError, as_config_error
from phantom.engine.machine.distributed import DEVICES
from phantom.engine.machine.precision import PRECISIONS
from phantom.engine.speed import SPEEDS
from phantom.report import CHOICES as ON_FAILURE
from phantom.validate import ANY, check_choice, check_count, check_flag, check_number

Check = Callable[[str, Any], None]  # takes a key and its value


def _text(key: str, value: object, *, what: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}={value!r} must be a {what}")


def _splits(key: str, value: object) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(split, str) for split in value):
        raise ValueError(f"{key}={value!r} must be a list of splits of the data, such as [test]")


def _one_of(allowed: Sequence[str | None]) -> Check:
    return partial(check_choice, allowed=allowed)


def _or_null(check: Callable[..., None], **allowed: Any) -> Check:
    return lambda key, value: None if value is None else check(key, value, **allowed)


COUNT = partial(check_count, least=1)
COUNT_OR_NULL = partial(check_count, least=1, also=" or null", optional=True)
SWITCH_OR_NULL = _or_null(check_flag, also=", or null to let speed= decide")
NAME, PATH_OR_NULL = partial(_text, what="name"), _or_null(_text, what="path or null")
# every root key that is no group, and what it may hold
RULES: dict[str, Check] = {
    "precision": _one_of(("auto", *PRECISIONS)),
    "speed": _one_of(SPEEDS),
    "gradient_precision": _one_of((None, "bf16")),
    "device": _one_of(DEVICES),
    "on_failure": _one_of(ON_FAILURE),
    "wandb": _one_of(tracking.MODES),
    "resume": _one_of(("auto", "never")),
    **dict.fromkeys(("epochs", "accumulate", "log_every", "keep_checkpoints", "smoke_steps", "repeats"), COUNT),
    **dict.fromkeys(("steps", "eval_every", "checkpoint_every", "subset", "test_subset"), COUNT_OR_NULL),
    "seed": partial(check_count, least=0),
    **dict.fromkeys(("deterministic", "sync_batchnorm", "progress"), check_flag),
    **dict.fromkeys(("compile", "cuda_graph"), SWITCH_OR_NULL),
    "ema": _or_null(check_number, allowed="(0, 1)", also=", or null for no average"),
    "target": _or_null(check_number, allowed=ANY, also=", or null to train to the end of the budget"),
    **dict.fromkeys(("runs", "wandb_project"), NAME),
    **dict.fromkeys(("init", "continue_from"), PATH_OR_NULL),
    "eval_splits": _splits,
}


def check_root(config: dict[str, Any]) -> None:
    """Check the values of the root keys.

    Raises:
        ConfigError: names the key, the value got and what is allowed.
    """
    missing = [key for key in RULES if key not in config]
    if missing:
        raise ConfigError(f"the config has no {', '.join(missing)}: it was written by another version of this program")
    variable = os.environ.get(tracking.VARIABLE)
    with as_config_error():
        for key, check in RULES.items():
            check(key, config[key])
        if variable and config["wandb"] != "disabled":
            check_choice(f"the environment's {tracking.VARIABLE}", variable, tracking.VARIABLE_MODES)
    if config["init"] is not None and config["continue_from"] is not None:
        raise ConfigError(
            "init and continue_from exclude each other: the run that continue_from names has weights of its own"
        )


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
