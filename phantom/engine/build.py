"""From a plan to what trains: the machine, the data, the model and the trainer."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

from phantom import DEQ, Rollout
from phantom.engine.artifacts.tracking import Tracker
from phantom.engine.artifacts.weights import LoadReference, load_initial, locate_weights
from phantom.engine.config.instantiate import instantiate
from phantom.engine.continuation import check_budget, check_continued
from phantom.engine.errors import ConfigError, as_config_error
from phantom.engine.machine import distributed, launcher, precision
from phantom.engine.machine.memory import begin_peak
from phantom.engine.model import check_model
from phantom.engine.plan import Plan
from phantom.engine.source import Shard, Source, Spec
from phantom.engine.speed import check_kernels, check_speed, choose_speed, speed_up
from phantom.engine.training.course import Course
from phantom.engine.training.loop import Trainer

log = logging.getLogger(__name__)


def build_model(plan: Plan, spec: Spec) -> nn.Module:
    """Return the model of the plan, given the numbers of the data's `spec`.

    Raises:
        ConfigError: the constructor refuses an argument, or what it makes is no `Model`.
    """
    return check_model(instantiate(plan.model_config, "model", **spec.inputs, deq=plan.deq), plan.deq)


def build_source(plan: Plan) -> Source:
    """Return the source of data, located and checked.

    Raises:
        ConfigError, DataError: the data cannot be found or read.
    """
    return instantiate(plan.config["data"], "data")


def set_up_machine(plan: Plan) -> tuple[torch.device, int, int]:
    """Set torch's global switches, join the other processes; return (this process's device, rank, world size).

    Raises:
        ConfigError: the device is not there, or not what the solvers need, or another process is not there.
    """
    precision.set_up(plan.config["precision"], deterministic=plan.config["deterministic"])
    with as_config_error(TimeoutError, DistError):
        device, rank, world_size = distributed.start(plan.config["device"])
    check_kernels(plan.config, device)
    return device, rank, world_size


def _say(line: str) -> None:
    if launcher.rank() == 0:
        log.info("%s", line)


def _beginning(plan: Plan) -> tuple[str | None, dict[str, Any] | None]:
    """Return the weights that the run starts from, if any, and the run that it continues.

    A run that resumes has its weights, and its origin, in the checkpoint.

    Raises:
        ConfigError, CheckpointError: either is not there, or does not fit.
    """
    # of a copy of the continued run that was cut short, last.pt is missing
    mark = "*.pt" if plan.config["continue_from"] is None else "last*.pt"
    if plan.config["resume"] != "never" and any(plan.folder.glob(mark)):
        return None, None
    if plan.config["init"] is not None:
        locate_weights(plan.config["init"])
    return plan.config["init"], check_continued(plan)


def _say_how_deep(deq: DEQ, course: Course | None) -> None:
    if deq.eval_solver is not None or not isinstance(deq.solver, Rollout):
        return
    steps, own = f"solver.max_steps={deq.solver.max_steps}", "eval_solver=rollout eval_solver.max_steps=<n>"
    if course is not None and course.depth is not None:
        _say(f"rollout: training runs the steps of course.depth, evaluation {steps}; {own} sets its number")
    elif deq.grad.needs_equilibrium:
        _say(
            f"rollout: training runs {steps} steps and those of {type(deq.grad).__name__}, evaluation the former "
            f"alone; {own} sets its number"
        )


def _make_tracker(plan: Plan, fresh: bool) -> Tracker:
    return Tracker(
        fresh=fresh,
        mode=plan.config["wandb"],
        project=plan.config["wandb_project"],
        name=f"{plan.label}/{plan.folder.parent.name}/{plan.folder.name}",
        group=plan.group or plan.label,
        tags=[str(leaf) for group in ("model", "data", "grad", "scale") if (leaf := plan.choices.get(group))],
        folder=plan.folder,
        config=plan.config,
    )


def build_trainer(plan: Plan, load_reference: LoadReference | None = None) -> Trainer:
    """Build everything that the run needs.

    Args:
        load_reference: translates official weights for `init=<code base>:<file>`, see `load_initial`.

    Raises:
        ConfigError, DataError: data that cannot be found, or a model that does not fit it.
        CheckpointError: the weights of `init`, or the run of `continue_from`, do not fit.
    """
    config: dict[str, Any] = plan.config
    device, rank, world_size = set_up_machine(plan)
    begin_peak(device)
    check_speed(config, device, world_size)
    init, origin = _beginning(plan)
    source = build_source(plan)
    wanted = plan.budget.eval_splits
    if any(split not in source.splits for split in wanted):
        raise ConfigError(
            f"eval_splits={list(wanted)} must name splits of the data, which has {', '.join(source.splits)}"
        )
    for split in wanted:
        if source.spec.sizes.get(split) == 0:
            raise ConfigError(f"the split {split!r} is empty: leave it out of eval_splits, or give it examples")
    check_budget(origin, plan.budget.total(source))
    source.to(device)
    torch.manual_seed(config["seed"])  # the same initial weights on every rank
    model = build_model(plan, source.spec).to(device)
    if init is not None:
        origin = load_initial(model, init, load_reference)
        _say("the run begins with the weights of " + ", ".join(f"{k} {v}" for k, v in origin.items()))
    speed = choose_speed(plan, model, plan.budget.total(source), device, world_size)
    _say(str(speed))
    _say_how_deep(plan.deq, plan.rules.course)
    rules = speed_up(model, plan.rules, speed)
    wrapped = distributed.wrap(model, device, world_size, sync_batchnorm=config["sync_batchnorm"])
    torch.manual_seed(config["seed"] + 1000003 * (rank + 1))  # but dropout masks of their own
    return Trainer(
        model=wrapped,
        unwrapped=model,
        task=plan.task,
        source=source,
        optimizer=plan.make_optimizer([p for p in model.parameters() if p.requires_grad]),
        schedule=plan.schedule,
        rules=rules,
        budget=plan.budget,
        clipping=plan.clipping,
        monitor=plan.monitor,
        ema_decay=config["ema"],
        shard=Shard(rank=rank, world=world_size, micro=config["accumulate"]),
        device=device,
        precision=config["precision"],
        speed=speed,
        progress=config["progress"],
        folder=plan.folder,
        config=plan.text,
        differences=plan.differences_to_resume,
        origin=origin,
        make_tracker=partial(_make_tracker, plan),
    )
