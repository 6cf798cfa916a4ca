"""Which models fit which data: a data set is of one kind of task, a model serves some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phantom.engine.config.configs import Configs
from phantom.engine.config.instantiate import locate
from phantom.engine.errors import ConfigError, as_config_error
from phantom.engine.tasks import BUILT_IN, Task
from phantom.validate import check_choice


def find_task(config: dict[str, Any]) -> Task:
    """Return the task of the config's data: the built-in one of its kind, or the one that the source names itself.

    Raises:
        ConfigError: no task is of this kind.
    """
    source = locate(config["data"]["_target_"])
    kind = _kind_of_data(config["data"])
    own = getattr(source, "task", None)
    if own:
        _check_task(own)
    found = [task for task in ([locate(own)] if own else BUILT_IN) if task.kind == kind]
    if not found:
        names = own or ", ".join(task.kind for task in BUILT_IN)
        raise ConfigError(
            f"kind={kind!r} of {source.__name__} is not that of a task ({names}): correct it, or set `task`"
        )
    return found[0]()


def _check_task(target: str) -> None:
    task: Any = locate(target)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ConfigError(f"task={target!r} must name a class that inherits from phantom.engine.tasks.Task")
    missing = [name for name in ("kind", "metric", "mode") if not hasattr(task, name)]
    if missing:
        raise ConfigError(f"{target} must set {', '.join(missing)}, as class attributes")
    with as_config_error(prefix=f"{target}: "):
        check_choice("mode", task.mode, ("max", "min"))


def model_config(config: dict[str, Any], kind: str, configs: Configs) -> dict[str, Any]:
    """Return the model's constructor for this kind of task, having checked that the model serves it.

    A model leaf is one constructor, or a family: a mapping from kinds of task to constructors.

    Raises:
        ConfigError: the model does not serve the kind; names the kinds it does.
    """
    model = config["model"]
    kinds = kinds_of_model(model)
    if kind in kinds:
        return model if "_target_" in model else model[kind]
    models = _fitting("model", configs, lambda leaf: kind in kinds_of_model(leaf))
    data = _fitting("data", configs, lambda leaf: _kind_of_data(leaf) in kinds)
    raise ConfigError(
        f"the model serves {', '.join(kinds)}, the data is {kind}: choose a model for this data ({models}) or data for "
        f"this model ({data})"
    )


def kinds_of_model(leaf: dict[str, Any]) -> list[str]:
    """Return the kinds of task that a model leaf serves."""
    return list(_declared(leaf["_target_"], "kinds") if "_target_" in leaf else leaf)


def _kind_of_data(leaf: dict[str, Any]) -> str:
    return _declared(leaf["_target_"], "kind")


def _declared(target: str, name: str) -> Any:
    found = getattr(locate(target), name, None)
    if found is None:
        raise ConfigError(f"{target} declares no `{name}`: the kind of task a data set is, or those a model serves")
    return found


def _fitting(group: str, configs: Configs, fits: Callable[[dict[str, Any]], bool]) -> str:
    names = [name for name in configs.leaves(group) if fits(configs.read(group, name))]
    return f"{group}=" + "|".join(names) if names else f"no {group} fits"
