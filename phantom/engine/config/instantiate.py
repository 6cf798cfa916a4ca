"""From a node of a config to an object: resolving, importing, and errors that name the field."""

from __future__ import annotations

import inspect
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phantom.engine.config.values import ESTIMATOR_KEYS
from phantom.engine.errors import ConfigError

# optional groups: absent from the config unless chosen
OPTIONAL = ("eval_solver", "clipping", "pretraining", "penalty", "jitter", "monitor")


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Return the config as plain data, checked for unused estimator keys and for values that are missing.

    `k` and `lam` leave the config when an experiment pinned them for an estimator that was then replaced.
    """
    used = str(OmegaConf.to_container(cfg, resolve=False)["grad"])
    container = OmegaConf.to_container(cfg, resolve=False)
    for key in ESTIMATOR_KEYS:
        if key in container and f"${{{key}}}" not in used:
            del container[key]
    try:
        config = OmegaConf.to_container(OmegaConf.create(container), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    # `pretraining=null` on top of an experiment leaves the experiment's numbers without a constructor: that is None too
    absent = {key: None for key in OPTIONAL if "_target_" not in (config.get(key) or {})}
    return config | absent


def instantiate(config: Any, field: str, **extra: Any) -> Any:
    """Build the object of a config node; errors name the field and, for an unknown key, the valid ones."""
    if config is None:
        return None
    try:
        return hydra.utils.instantiate(config, **extra, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        reason = unknown_keys(config, extra, cause) or " ".join(str(cause).split())
        raise ConfigError(f"{field}: {reason}") from error


def locate(target: str) -> Any:
    """Return the class of a `_target_`."""
    try:
        return hydra.utils.get_class(target)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{target} cannot be imported: {str(error).splitlines()[0]}") from error


def unknown_keys(config: Any, extra: dict[str, Any], cause: Exception) -> str:
    """Return the sentence on keys that the constructor does not have; nothing where that was not the cause."""
    if not isinstance(cause, TypeError) or "unexpected keyword" not in str(cause):
        return ""
    target = hydra.utils.get_object(config["_target_"])
    valid = [name for name in inspect.signature(target).parameters if name not in extra and name != "self"]
    unknown = [key for key in config if not key.startswith("_") and key not in valid]
    return f"{config['_target_']} has no key {', '.join(unknown)}; valid keys: {', '.join(valid)}" if unknown else ""
