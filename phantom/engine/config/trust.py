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

# packages whose classes a saved config may name; beside them torch's optimisers
PACKAGES = ("phantom", "models", "data")
OPTIMIZERS = "torch.optim"
# the only function: it chooses among timm's optimisers
TIMM = "timm.optim.create_optimizer_v2"
# the class that every group's constructor derives from
KINDS: dict[str, type] = {
    **{"solver": Solver, "adjoint_solver": Solver, "eval_solver": Solver, "grad": GradientEstimator},
    **{"data": Source, "model": nn.Module, "optimizer": optim.Optimizer, "schedule": Schedule, "clipping": Clipping},
    **{"pretraining": Pretraining, "penalty": Penalty, "jitter": Jitter, "course": Course},
    "monitor": Monitor,
}
# what a run saves beside mappings
PLAIN = (str, bool, int, float, list, type(None))
# those of a constructor's arguments
PARTS = (Solver, GradientEstimator, JacobianRegularizer, Value, nn.Module)


def check_trusted(config: Mapping[str, Any], *, trust: str | None = None) -> None:
    """Raise unless everything that a saved config builds is of this project, or trusted; import nothing else to see.

    Args:
        trust: further packages, the user's own, separated by commas. What they define is admitted in any place.

    Raises:
        ConfigError: names the target and the way out.
    """
    trusted = tuple(name for part in (trust or "").split(",") if (name := part.strip()))
    for path, node in _nodes(config, ()):
        if isinstance(node, Mapping):
            if "_target_" in node:
                _check(str(node["_target_"]), path, trusted)
        # Hydra builds what is in a tuple, too, which YAML makes of `!!pairs` and `!!omap`
        elif not isinstance(node, PLAIN) or (isinstance(node, str) and "${" in node):
            raise ConfigError(f"{'.'.join(path)}={node!r} of the saved config is refused: a run saves plain values")


def _nodes(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, node
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _nodes(value, (*path, str(key)))


def _check(target: str, path: tuple[str, ...], trusted: tuple[str, ...]) -> None:
    if target == TIMM and path == ("optimizer",):
        return
    place = ".".join(path)
    wanted = PARTS if len(path) > 1 and path != ("model", path[-1]) else (KINDS.get(path[0]) if path else None,)
    admitted = f", and what {', '.join(trusted)} defines" if trusted else ""
    refused = ConfigError(
        f"{place}._target_={target!r} of the saved config is refused: a run folder may build classes of "
        f"{', '.join(PACKAGES)} and {OPTIMIZERS} that fit their place{admitted}, and nothing else. If the folder is "
        "from a source that you trust and names a package of your own, add trust=<package>, or several with commas"
    )
    if not _inside(target, (*PACKAGES, OPTIMIZERS, *trusted)):
        raise refused
    found = _resolve(target)
    home = getattr(found, "__module__", "")
    if _inside(home, trusted):
        return
    inside = _inside(home, (*PACKAGES, OPTIMIZERS))
    if not (isinstance(found, type) and inside and any(kind and issubclass(found, kind) for kind in wanted)):
        raise refused


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


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
