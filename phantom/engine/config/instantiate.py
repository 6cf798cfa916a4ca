"""From a node of a config to an object, with errors that name the field."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from phantom.engine.errors import ConfigError, UserError

# how a constructor refuses values, or misses files; anything else is a fault of its code, which a traceback shows
REFUSALS = (ValueError, TypeError, OSError, ImportError, InstantiationException)
# whose messages need no place: they are about values, and raised on purpose
KNOWN = ("phantom", "models", "data", "torch", "timm", "hydra", "importlib")


def instantiate(config: Any, field: str, **extra: Any) -> Any:
    """Build the object of a config node; errors name the field and, for an unknown key, the valid ones.

    Raises:
        ConfigError: the constructor refuses the keys or the values.
        Exception: what else it raises, such as a KeyError, is raised as it is.
    """
    if config is None:
        return None
    try:
        return hydra.utils.instantiate(config, **extra, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, REFUSALS):
            reason = unknown_keys(config, extra, cause) or " ".join(f"{cause}{place_of(cause)}".split())
            raise ConfigError(f"{field}: {reason}") from error
    cause.add_note(f"raised while {field} was built, from {config.get('_target_')}")
    raise cause


def place_of(error: BaseException) -> str:
    """Return in brackets where in the user's own code an error was raised; nothing where it was raised elsewhere."""
    if isinstance(error, UserError):
        return ""
    while error.__cause__ is not None:  # of a module that cannot be imported, what it raised
        error = error.__cause__
    places = [
        (str(frame.f_globals.get("__name__")).partition(".")[0], f"{frame.f_code.co_filename}, line {line}")
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    own = next((package for package, _ in places if package not in KNOWN), None)
    # it may have called a library, which is no place to look at
    found = [place for package, place in places if package == own]
    return f" ({type(error).__name__} in {found[-1]})" if found else ""


def locate(target: str) -> Any:
    """Return the class or function of a `_target_`.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return hydra.utils.get_object(target)
    except (ImportError, ValueError) as error:
        # Hydra's first line names the target alone, and the reason stands below
        reason = " ".join(f"{error}{place_of(error)}".split())
        raise ConfigError(f"{target} cannot be imported: {reason}") from error


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
