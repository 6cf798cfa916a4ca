"""From a node of a config to an object, with errors that name the field."""

from __future__ import annotations

import inspect
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from phantom.engine.errors import ConfigError


def instantiate(config: Any, field: str, **extra: Any) -> Any:
    """Build the object of a config node; errors name the field and, for an unknown key, the valid ones.

    Raises:
        ConfigError: the constructor refuses the keys or the values.
    """
    if config is None:
        return None
    try:
        return hydra.utils.instantiate(config, **extra, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        reason = unknown_keys(config, extra, cause) or " ".join(str(cause).split())
        raise ConfigError(f"{field}: {reason}") from error


def locate(target: str) -> Any:
    """Return the class or function of a `_target_`.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return hydra.utils.get_object(target)
    except (ImportError, ValueError) as error:
        # Hydra's first line names the target alone, and the reason stands below
        raise ConfigError(f"{target} cannot be imported: {' '.join(str(error).split())}") from error


def parameters_of(target: str) -> set[str]:
    """Return the names of the arguments that the constructor of a `_target_` takes."""
    return set(inspect.signature(locate(target)).parameters)


def unknown_keys(config: Any, extra: dict[str, Any], cause: BaseException) -> str:
    """Return the sentence on keys that the constructor does not have; nothing where that was not the cause."""
    if not isinstance(cause, TypeError) or "unexpected keyword" not in str(cause):
        return ""
    target = hydra.utils.get_object(config["_target_"])
    valid = [name for name in inspect.signature(target).parameters if name not in extra and name != "self"]
    unknown = [key for key in config if not key.startswith("_") and key not in valid]
    return f"{config['_target_']} has no key {', '.join(unknown)}; valid keys: {', '.join(valid)}" if unknown else ""
