"""Which models fit which data: a data set is of one kind of task, a model serves some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from phantom.engine.config.instantiate import locate
from phantom.engine.config.values import CONFIGS, leaves
from phantom.engine.errors import ConfigError


def model_config(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the model's constructor for this kind of task.

    A model leaf is one constructor, or a family: a mapping from kinds of task to constructors.

    Raises:
        ConfigError: the model does not serve the kind; names the kinds it does.
    """
    model = config["model"]
    if "_target_" in model:
        kinds = _declared(model["_target_"], "kinds")
        if kind in kinds:
            return model
    else:
        kinds = list(model)
        if kind in kinds:
            return model[kind]
    raise ConfigError(
        f"the model serves {', '.join(kinds)}, the data is {kind}: choose a model for this data "
        f"({_fitting('model', lambda leaf: kind in _kinds_of_model(leaf))}) or data for this model "
        f"({_fitting('data', lambda leaf: _kind_of_data(leaf) in kinds)})"
    )


def check_pair(config: dict[str, Any]) -> str:
    """Return the kind of task of the data, having checked that the model serves it, before building either."""
    kind = _kind_of_data(config["data"])
    model_config(config, kind)
    return kind


def _kind_of_data(leaf: dict[str, Any]) -> str:
    return _declared(leaf["_target_"], "kind")


def _kinds_of_model(leaf: dict[str, Any]) -> Sequence[str]:
    return _declared(leaf["_target_"], "kinds") if "_target_" in leaf else list(leaf)


def _declared(target: str, name: str) -> Any:
    found = getattr(locate(target), name, None)
    if found is None:
        raise ConfigError(f"{target} declares no `{name}`: the kind of task a data set is, or those a model serves")
    return found


def _fitting(group: str, fits: Any) -> str:
    files = {name: OmegaConf.load(CONFIGS / group / f"{name}.yaml") for name in leaves(group)}
    names = [name for name, leaf in files.items() if fits(OmegaConf.to_container(leaf, resolve=False))]
    return f"{group}=" + "|".join(names) if names else f"no {group} fits"
