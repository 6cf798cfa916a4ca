"""A run as its config describes it: every setting checked and built, once, before data or a model exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import Optimizer

from phantom import DEQ, SHINE, Broyden, Solver
from phantom.engine.artifacts import identity
from phantom.engine.config import compose
from phantom.engine.config.compatibility import find_task, model_config
from phantom.engine.config.configs import Configs
from phantom.engine.config.instantiate import instantiate, parameters_of, place_of, unknown_keys
from phantom.engine.config.recipes import canonical
from phantom.engine.config.upgrade import read, upgrade
from phantom.engine.config.values import check_rates, check_root
from phantom.engine.errors import ConfigError, as_config_error
from phantom.engine.machine.precision import settle
from phantom.engine.measure.monitor import Monitor
from phantom.engine.speed import check_cuda_graph
from phantom.engine.tasks import Task
from phantom.engine.training.budget import Budget
from phantom.engine.training.clipping import Clipping
from phantom.engine.training.rules import Rules
from phantom.engine.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command line, the builder, the record and the scripts know of a run.

    Args:
        config: the resolved config, plain values.
        model_config: the constructor of the model for this kind of data.
        label: the experiment's name, or model-data-gradient; with the scale unless it is the paper's.
        choices: the chosen leaf of every group; empty for a config that was saved.
        overrides: the `key=value` items behind the config.
        make_optimizer: returns the optimiser of some parameters.
        defaults: the root keys of train.yaml, for comparing with configs that lack some.
        group: the sweep that the run is a job of; empty for a run on its own.
    """

    config: dict[str, Any]
    model_config: dict[str, Any]
    label: str
    choices: dict[str, Any]
    overrides: tuple[str, ...]
    task: Task
    deq: DEQ
    rules: Rules
    schedule: Schedule
    clipping: Clipping | None
    monitor: Monitor | None
    budget: Budget
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    defaults: dict[str, Any]
    group: str = ""

    @property
    def folder(self) -> Path:
        """The run folder, a pure function of label, overrides and seed."""
        return identity.run_folder(self.root, self.label, self.overrides, self.config["seed"])

    @property
    def recipe(self) -> str | None:
        """The recipe in use; None for a pair that has none, or for a config that was saved."""
        return self.choices.get("recipe")

    @property
    def root(self) -> Path:
        """The folder of all runs."""
        with as_config_error(RuntimeError, prefix=f"runs={self.config['runs']}: "):  # ~ of a user without a home
            return Path(self.config["runs"]).expanduser().absolute()

    @property
    def text(self) -> str:
        """The config as YAML, as checkpoints and the run folder keep it."""
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)

    def differences_to_resume(self, text: str) -> list[str]:
        """Return those of `differences` that forbid to go on: of a run that continues another one, the budget may."""
        free = () if self.config["continue_from"] is None else identity.BUDGET
        return [key for key in self.differences(text) if key not in free]

    def differences(self, text: str) -> list[str]:
        """Return the root keys that say another run than the config saved as `text`; see `identity.CIRCUMSTANCES`.

        Raises:
            ConfigError: the text is damaged.
        """
        # both, as a leaf need not write every argument of a nested part
        return identity.differences(upgrade(self.config, self.defaults), read(text, self.defaults))


def make_plan(overrides: Sequence[str], configs: Configs) -> Plan:
    """Return the plan of `train.py <overrides>`.

    Raises:
        ConfigError: an unknown key or leaf, an impossible value or pair, or a key the chosen estimator does not use.
    """
    overrides = canonical(overrides, configs)
    config, choices = compose.compose(overrides, configs)
    return plan_of(config, choices=choices, overrides=overrides, configs=configs)


def plan_of(
    config: dict[str, Any], *, configs: Configs, choices: dict[str, Any], overrides: Sequence[str], label: str = ""
) -> Plan:
    """Return the plan of a resolved config.

    Args:
        label: of a config that was saved, whose choices are not known.

    Raises:
        ConfigError: names the field, the value and what is allowed.
    """
    check_root(config)
    config = _settled(config)
    task = find_task(config)
    model = model_config(config, task.kind, configs)
    check_cuda_graph(config, task)
    deq = _deq(config)
    return Plan(
        config=config,
        model_config=model,
        label=label or _label(config, choices),
        choices=choices,
        overrides=tuple(overrides),
        task=task,
        deq=deq,
        rules=_rules(config, deq),
        make_optimizer=optimizer_factory(config["optimizer"]),
        schedule=instantiate(config["schedule"], "schedule"),
        clipping=instantiate(config["clipping"], "clipping"),
        monitor=instantiate(config["monitor"], "monitor"),
        budget=_budget(config),
        defaults=configs.defaults,
    )


def _settled(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the numbers that the machine decides, which a record holds.

    The word auto would mean another precision on another machine. Where `compile` is null the solvers are written down
    as not compiled; `build_trainer` compiles them with f.
    """
    settled = config | {"precision": settle(config["precision"], config["device"])}
    for name in ("solver", "adjoint_solver", "eval_solver"):
        settled[name] = _plain(config[name])
    if "solver" in config["grad"]:
        settled["grad"] = config["grad"] | {"solver": _plain(config["grad"]["solver"])}
    return settled


def _plain(solver: dict[str, Any] | None) -> dict[str, Any] | None:
    return solver | {"compile": False} if solver is not None and solver.get("compile", False) is None else solver


def _label(config: dict[str, Any], choices: dict[str, Any]) -> str:
    label = choices.get("experiment") or "-".join(str(choices[group]) for group in ("model", "data", "grad"))
    return label if config["scale"] == "paper" else f"{label}@{config['scale']}"


def _deq(config: dict[str, Any]) -> DEQ:
    solver: Solver = instantiate(config["solver"], "solver")
    grad = instantiate(config["grad"], "grad")
    eval_solver: Solver | None = instantiate(config["eval_solver"], "eval_solver")
    dtype = torch.bfloat16 if config["gradient_precision"] == "bf16" else None
    with as_config_error(TypeError):
        deq = DEQ(
            solver=solver,
            grad=grad,
            eval_solver=eval_solver,
            gradient_precision=dtype,
            confirm=False,
            on_failure=config["on_failure"],
        )
    for name, found in (("solver", solver), ("eval_solver", eval_solver)):
        if found is not None and found.max_steps < 1:
            raise ConfigError(
                f"{name}.max_steps={found.max_steps} must be an integer >= 1; grad=bptt trains without a solve"
            )
    if isinstance(grad, SHINE) and not isinstance(solver, Broyden):
        raise ConfigError("grad=shine reuses the steps of the forward solve: it needs solver=broyden")
    return deq


def _rules(config: dict[str, Any], deq: DEQ) -> Rules:
    names = ("pretraining", "penalty", "jitter", "course")
    rules = {name: instantiate(config[name], name) for name in names}
    with as_config_error():
        return Rules(solver=deq.solver, grad=deq.grad, seed=config["seed"], **rules)


def _budget(config: dict[str, Any]) -> Budget:
    names = ("epochs", "steps", "eval_every", "log_every", "checkpoint_every", "keep_checkpoints", "target")
    return Budget(**{name: config[name] for name in names}, eval_splits=tuple(config["eval_splits"]))


def optimizer_factory(settings: dict[str, Any]) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """Return the optimiser's constructor, tried on one parameter: optimisers check their values there."""
    check_rates(settings)
    if settings.get("_partial_") is not True and "params" in parameters_of(settings["_target_"]):
        raise ConfigError("optimizer: its leaf needs `_partial_: true`, for the parameters come later")
    partial = instantiate(settings, "optimizer")

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        try:
            return partial(list(parameters))
        except (TypeError, ValueError, RuntimeError) as error:
            reason = unknown_keys(settings, {}, error) or f"{error}{place_of(error)}"
            raise ConfigError(f"optimizer: {reason}") from error

    tried = make([nn.Parameter(torch.zeros(2, 2))])
    closure = inspect.signature(tried.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer: {type(tried).__name__}.step needs a closure that computes the loss again, and a step here "
            "computes it once: choose an optimiser without one"
        )
    return make
