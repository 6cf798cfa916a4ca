"""Rebuild a run, or weights that ship, and evaluate it; or evaluate official weights under a composed config."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from phantom.engine.artifacts import checkpoint, shipped
from phantom.engine.artifacts.weights import LoadReference, load_initial, read_tensors
from phantom.engine.build import build_model, build_source, set_up_machine
from phantom.engine.config.configs import Configs
from phantom.engine.config.overrides import change
from phantom.engine.config.trust import KINDS, PACKAGES, check_trusted
from phantom.engine.config.upgrade import read
from phantom.engine.errors import CheckpointError, ConfigError, as_config_error
from phantom.engine.plan import Plan, make_plan, plan_of
from phantom.engine.source import Shard, Source, Spec
from phantom.engine.tasks import Task
from phantom.engine.training.evaluation import evaluate

# arguments of a data set that say where it writes; in a saved config, anybody may have written them
WRITES_NOWHERE = {"download": False, "cache": None}


class Rebuilt(NamedTuple):
    """A model with its weights, the plan of its training, and its data.

    Args:
        about: facts about the weights, for the answer: their step, or the code base that wrote them.
        split: on which the number of their record was taken; None where no record names one.
    """

    plan: Plan
    model: nn.Module
    source: Source
    device: torch.device
    shard: Shard
    about: dict[str, Any]
    split: str | None = None

    @property
    def task(self) -> Task:
        return self.plan.task


def rebuild_run(
    folder: Path, *, which: str, overrides: Sequence[str], configs: Configs, trust: str | None = None
) -> Rebuilt:
    """Return the model of a run with the weights of one of its checkpoints: the moving average if it has one.

    The saved config is not trusted: it builds classes of this project and torch's optimisers, and nothing else. Its
    `data.download` and `data.cache` do not count, for they say where files are written.

    Args:
        folder: the run folder.
        which: `best`, `last`, or one that was kept before it: `last-1`, `last-2`.
        overrides: key=value items that change the run's config, such as `eval_solver.max_steps=40`. An `eval_solver`
            that the run does not have starts as a copy of its solver. They are the user's own, and trusted.
        trust: packages of the user's own, separated by commas; the saved config may build what they define, too.

    Raises:
        CheckpointError: the folder or its checkpoint is missing, damaged, or of another model.
        ConfigError: an override names an unknown key, or the saved config builds something else.
    """
    if not re.fullmatch(r"best|last(-[1-9]\d*)?", which):
        raise ConfigError(f"checkpoint={which} is not known: choose best, last, or an older one, such as last-1")
    if not folder.is_dir():
        raise CheckpointError(f"there is no run folder {folder}: train first, or correct run=")
    path = folder / f"{which}.pt"
    state = checkpoint.load(path)
    if not {"config", "model", "ema", "step"} <= state.keys() or not isinstance(state["config"], str):
        raise CheckpointError(f"{path} is not a checkpoint of a run: it lacks its config, weights or step")
    plan = _saved_plan(state["config"], folder, overrides=overrides, configs=configs, trust=trust)
    weights = state["model"] if state["ema"] is None else state["ema"]
    return _rebuild(plan, lambda model: checkpoint.load_weights(model, weights, path), {"step": state["step"]})


def rebuild_shipped(folder: Path, *, overrides: Sequence[str], configs: Configs, trust: str | None = None) -> Rebuilt:
    """Return the model of weights that ship; without overrides it has exactly the number of their record.

    Args:
        folder: see `phantom.engine.artifacts.shipped`.
        overrides, trust: see `rebuild_run`.

    Raises:
        CheckpointError, ConfigError: see `load_shipped`.
    """
    found = shipped.read(folder)
    plan = _saved_plan(found.config, folder, overrides=overrides, configs=configs, trust=trust)
    about = {"weights": folder.name, "checkpoint": found.about.checkpoint, "step": found.about.step}
    run = _rebuild(plan, lambda model: checkpoint.load_weights(model, found.tensors, found.path), about)
    return run._replace(split=found.about.split)


def load_shipped(folder: Path, *, overrides: Sequence[str], configs: Configs) -> nn.Module:
    """Return the model of weights that ship, for evaluation, on the CPU. No data is read.

    Args:
        folder: see `phantom.engine.artifacts.shipped`.
        overrides: see `rebuild_run`.

    Raises:
        CheckpointError: the folder holds no weights, damaged ones, or those of another model.
        ConfigError: an override names an unknown key, or the saved config builds classes of elsewhere.
    """
    found = shipped.read(folder)
    plan = _saved_plan(found.config, folder, overrides=overrides, configs=configs, trust=None)
    model = build_model(plan, Spec(kind=plan.task.kind, inputs=found.about.inputs, sizes={}))
    checkpoint.load_weights(model, found.tensors, found.path)
    return model.eval()


def begin_run(overrides: Sequence[str], configs: Configs, load_reference: LoadReference) -> Rebuilt:
    """Return the model of `train.py <overrides>` with the weights that the run begins with, drawn or those of `init`.

    Args:
        load_reference: see `build_trainer`.

    Raises:
        ConfigError, DataError, CheckpointError: as for training; `continue_from`, which is a run.
    """
    plan = make_plan(overrides, configs)
    init, continued = plan.config["init"], plan.config["continue_from"]
    if continued is not None:
        raise ConfigError(f"continue_from={continued} begins where that run stands: name it with run=<folder>")
    if init is None:
        return _rebuild(plan, lambda model: None, {"step": 0})
    return _rebuild(plan, lambda model: load_initial(model, init, load_reference), {"step": 0, "init": init})


def rebuild_official(
    path: Path, *, source: str, overrides: Sequence[str], configs: Configs, load_reference: LoadReference
) -> Rebuilt:
    """Return the model of an official checkpoint, loaded by its own names.

    Args:
        path: the file of tensors.
        source: the code base that wrote it.
        overrides: key=value items that compose the config, as for train.py.
        load_reference: called as `load_reference(model, state, source)`; translates the official names.

    Raises:
        CheckpointError: the file is missing, or does not hold tensors alone.
        ConfigError: the config does not compose, or the checkpoint is of another model or code base.
    """
    plan = make_plan(overrides, configs)
    state = read_tensors(path)

    def load(model: nn.Module) -> None:
        with as_config_error(TypeError, prefix=f"{path}: "):
            load_reference(model, state, source)

    return _rebuild(plan, load, {"source": source})


def _saved_plan(text: str, folder: Path, *, overrides: Sequence[str], configs: Configs, trust: str | None) -> Plan:
    with as_config_error(prefix=f"{folder}: "):
        saved = read(text, configs.defaults)
    check_trusted(saved, trust=trust)
    _check_groups(saved, configs)
    config = change(_without_places(saved), overrides, configs)
    return plan_of(config, configs=configs, choices={}, overrides=overrides, label=str(folder))


def _without_places(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved config whose data set writes where this machine keeps its cache: its own places are another's."""
    data = saved.get("data")
    if not isinstance(data, dict) or str(data.get("_target_")).partition(".")[0] not in PACKAGES:
        return saved
    return saved | {"data": data | {key: value for key, value in WRITES_NOWHERE.items() if key in data}}


def _check_groups(saved: dict[str, Any], configs: Configs) -> None:
    """Raise ConfigError where a group of a saved config is no constructor; a model may be one per kind of task."""
    for group in KINDS:
        node = saved.get(group)
        # only some estimators have an adjoint solver
        if node is None and (configs.groups.get(group) is None or group == "adjoint_solver"):
            continue
        family = node.values() if group == "model" and isinstance(node, dict) and "_target_" not in node else [node]
        if not family or not all(isinstance(part, dict) and isinstance(part.get("_target_"), str) for part in family):
            raise ConfigError(f"{group}={node!r} of the saved config is no mapping with a _target_: it is damaged")


def _rebuild(plan: Plan, load: Callable[[nn.Module], object], about: dict[str, Any]) -> Rebuilt:
    device, rank, world_size = set_up_machine(plan)
    source = build_source(plan)
    torch.manual_seed(plan.config["seed"])
    model = build_model(plan, source.spec).to(device)
    load(model)
    return Rebuilt(plan, model, source, device, Shard(rank=rank, world=world_size), about)


def evaluate_rebuilt(run: Rebuilt, split: str | None) -> dict[str, Any]:
    """Return the metrics of a rebuilt model on a split: exactly the run's own numbers, where no override changed them.

    Args:
        split: None takes that of the weights' record, or else the first of the config's `eval_splits`.

    Raises:
        ConfigError: the data has no such split.
    """
    split = split or run.split or run.plan.budget.eval_splits[0]
    if split not in run.source.splits:
        raise ConfigError(f"split={split!r} does not exist; the data has {', '.join(run.source.splits)}")
    metrics = evaluate(
        run.model,
        run.task,
        run.source,
        split,
        shard=run.shard,
        device=run.device,
        precision=run.plan.config["precision"],
    )
    return {"split": split, **run.about, **metrics}
