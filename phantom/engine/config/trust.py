"""Limits on the config of a saved run: it may build classes of this project and torch's optimisers, each in its place.

A run folder from elsewhere is data, and must not run code. The list of targets that Hydra refuses since 1.3.6 is a
second line of defence: these limits do not depend on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn, optim

from phantom import GradientEstimator, JacobianRegularizer, Solver
from phantom.engine.errors import ConfigError
from phantom.engine.measure.monitor import Monitor
from phantom.engine.source import Source
from phantom.engine.training.clipping import Clipping
from phantom.engine.training.course import Course, Value
from phantom.engine.training.rules import Jitter, Penalty, Pretraining
from phantom.engine.training.schedule import Schedule

# top-level packages whose classes a saved config may name
PACKAGES = ("phantom", "models", "data")
# the only function: it chooses among timm's optimisers
TIMM = "timm.optim.create_optimizer_v2"
# the class that every group's constructor derives from
KINDS: dict[str, type] = {
    **{"solver": Solver, "adjoint_solver": Solver, "eval_solver": Solver, "grad": GradientEstimator},
    **{"data": Source, "model": nn.Module, "optimizer": optim.Optimizer, "schedule": Schedule, "clipping": Clipping},
    **{"pretraining": Pretraining, "penalty": Penalty, "jitter": Jitter, "course": Course},
    "monitor": Monitor,
}
# those of a constructor's arguments
PARTS = (Solver, GradientEstimator, JacobianRegularizer, Value, nn.Module)


def check_trusted(config: Mapping[str, Any], *, trust: str | None = None) -> None:
    """Raise unless everything that a saved config builds is of this project; import nothing else to find out.

    Args:
        trust: a further top-level package, the user's own.

    Raises:
        ConfigError: names the target and the way out.
    """
    packages = (*PACKAGES, *([trust] if trust else []))
    for path, node in _nodes(config, ()):
        if not isinstance(node, Mapping):
            if isinstance(node, str) and "${" in node:
                raise ConfigError(f"{'.'.join(path)}={node!r} of the saved config is refused: a run saves plain values")
        elif "_target_" in node:
            _check(str(node["_target_"]), path, packages)


def _nodes(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, node
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _nodes(value, (*path, str(key)))


def _check(target: str, path: tuple[str, ...], packages: tuple[str, ...]) -> None:
    if target == TIMM and path == ("optimizer",):
        return
    place = ".".join(path)
    wanted = PARTS if len(path) > 1 and path != ("model", path[-1]) else (KINDS.get(path[0]) if path else None,)
    refused = ConfigError(
        f"{place}._target_={target!r} of the saved config is refused: a run folder may build classes of "
        f"{', '.join(packages)} and torch.optim that fit their place, and nothing else. If the folder is from a source "
        "that you trust and names a package of your own, add trust=<package>"
    )
    if target.partition(".")[0] not in (*packages, "torch") or (
        target[:6] == "torch." and target[:12] != "torch.optim."
    ):
        raise refused
    found = _resolve(target)
    home = getattr(found, "__module__", "")
    inside = home.partition(".")[0] in packages or home == "torch.optim" or home.startswith("torch.optim.")
    if not (isinstance(found, type) and inside and any(kind and issubclass(found, kind) for kind in wanted)):
        raise refused


def _resolve(target: str) -> Any:
    """Return what `target` names: the longest module that can be imported, then attributes."""
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None
