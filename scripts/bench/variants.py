"""From a command line to training steps: plans, synthetic batches, and one `Variant` per combination."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from phantom import BPTT, UPG, GradientEstimator
from phantom.deq import deqs_of
from phantom.engine.build import build_model
from phantom.engine.config.compatibility import kinds_of_model
from phantom.engine.config.compose import FILLS
from phantom.engine.config.instantiate import parameters_of
from phantom.engine.config.overrides import expand
from phantom.engine.errors import ConfigError, as_config_error
from phantom.engine.machine import precision
from phantom.engine.measure.timing import StepTimer
from phantom.engine.plan import Plan, make_plan, plan_of
from phantom.engine.source import Shard, Spec
from phantom.engine.speed import compile_cell
from phantom.engine.tasks.base import Score
from phantom.engine.training.cuda_graph import WARM_UP_STEPS
from phantom.engine.training.step import Step
from scripts.bench import batches
from scripts.bench.instruments import Tracer
from scripts.bench.standins import Work
from scripts.bench.unhoisted import UnhoistedCell
from train import CONFIGS

# keys of the benchmark itself; all others are those of train.py
OWN = {"batch": "32", "size": "32", "classes": "10", "hoist": "true"}
# a fixed budget, unless the command line says otherwise: equal work is what can be compared
FIXED = ("solver.tol", "adjoint_solver.tol")
# the cell's method that gives it the form of `speed`; like `compile`, it leaves solvers to keys of their own
FORMS = {"kernels": "fuse", "padded": "pad"}
# training moves the weights, and a benchmark wants every step alike
RATE = 1e-6


@dataclass(frozen=True)
class Setting:
    """One combination of a sweep: its plan, and the keys of the benchmark.

    Args:
        label: what differs from the other settings.
    """

    label: str
    plan: Plan
    batch: int
    size: int
    classes: int
    hoist: bool


@dataclass
class Variant:
    """A model with its optimiser and its batch, ready to take the trainer's own step."""

    label: str
    plan: Plan
    model: nn.Module
    grad: GradientEstimator
    device: torch.device
    batch: tuple[Any, ...]
    carry: Any
    optimizer: torch.optim.Optimizer
    take: Step | None = None

    def step(self, timer: StepTimer | Tracer) -> Score:
        """Take one training step, its phases marked by `timer`."""
        precision.set_up(self.plan.config["precision"], deterministic=False)
        if self.take is None or self.take.timer is not timer:
            self.take = self._make_step(timer, cuda_graph=False)
        self.take.reset_window()
        self.take.carries = [self.carry]
        return self.take([self.batch], number=1)

    def replay(self, timer: StepTimer) -> None:
        """Capture forward and backward as a CUDA graph, and replay it from now on."""
        self.take = self._make_step(timer, cuda_graph=True)
        for _ in range(WARM_UP_STEPS + 1):
            self.step(timer)

    def _make_step(self, timer: StepTimer | Tracer, *, cuda_graph: bool) -> Step:
        return Step(
            model=self.model,
            unwrapped=self.model,
            task=self.plan.task,
            optimizer=self.optimizer,
            clipping=self.plan.clipping,
            ema_decay=None,
            shard=Shard(),
            device=self.device,
            precision=self.plan.config["precision"],
            cuda_graph=cuda_graph,
            timer=timer,
        )

    def graph_evals(self) -> int:
        """Return how often f is evaluated with a graph, per solve."""
        return self.grad.k if isinstance(self.grad, UPG) else self.grad.num_steps if isinstance(self.grad, BPTT) else 1


def settings(arguments: Sequence[str]) -> list[Setting]:
    """Return one setting per combination of the sweep; `k` and `lam` vary only where the estimator has them.

    Raises:
        ConfigError: an unknown key or an impossible value.
    """
    jobs = [dict(item.split("=", 1) for item in job) for job in expand(arguments)]
    varying = [key for key in jobs[0] if len({job[key] for job in jobs}) > 1]
    found: dict[str, Setting] = {}
    for job in jobs:
        own = {key: job.get(key, default) for key, default in OWN.items()}
        overrides = used({key.lstrip("+"): value for key, value in job.items() if key not in OWN})
        made = plan(overrides)
        names = [made.config["grad"]["_target_"].rsplit(".", 1)[-1].lower()]
        names += [f"k={made.config['k']}"] if "k" in made.config else []
        kept = [key for key in varying if key not in ("grad", "k") and (key in overrides or key in OWN)]
        label = " ".join(names + [f"{key}={job[key]}" for key in kept])
        numbers = {key: _count(key, own[key]) for key in ("batch", "size", "classes")}
        hoist = _flag("hoist", own["hoist"])
        found.setdefault(label, Setting(label=label, plan=made, hoist=hoist, **numbers))
    return list(found.values())


def plan(overrides: dict[str, str]) -> Plan:
    """Return the plan of train.py for data that the model serves, with a fixed budget unless `overrides` say otherwise.

    The data is named for its kind alone: batches are synthetic, nothing is read, and its recipe is not followed.
    """
    grad = overrides.get("grad", str(CONFIGS.groups["grad"]))
    fixed = used({key: "null" for key in FIXED if key not in overrides} | {"grad": grad})
    kind = _kind_of(overrides.get("model", str(CONFIGS.groups["model"])))
    items = {"data": batches.DATA[kind], "recipe": "null", **fixed, **overrides}
    return make_plan([f"{key}={value}" for key, value in items.items()], CONFIGS)


def used(overrides: dict[str, str]) -> dict[str, str]:
    """Return the overrides without the keys that their estimator does not take: a sweep gives them to every job."""
    leaf = overrides.get("grad", str(CONFIGS.groups["grad"]))
    if leaf not in CONFIGS.leaves("grad"):
        return overrides  # the plan names the leaf and those that exist
    node = CONFIGS.read("grad", leaf)
    takes = parameters_of(node.get("grad", node)["_target_"])
    return {key: value for key, value in overrides.items() if FILLS.get(key.split(".")[0], "") in {"", *takes}}


def make(setting: Setting, device: torch.device) -> Variant:
    """Build the variant: the same initial weights and the same batch for every setting of the same shape."""
    made = setting.plan
    kind = made.task.kind
    inputs, batch = batches.make(kind, batch=setting.batch, size=setting.size, classes=setting.classes)
    torch.manual_seed(made.config["seed"])
    model = build_model(made, Spec(kind=kind, inputs=inputs, sizes={})).to(device)
    batch = tuple(part.to(device) for part in batch)
    carry = batches.full_memory(model, batch) if kind == "language_modelling" else None
    if not setting.hoist:
        if kind != "language_modelling" or made.config["compile"]:
            raise ConfigError("hoist=false is for the DEQ Transformer, and not for compile=true")
        model.cell = UnhoistedCell(model.cell)
    _set_form(model, made.config["speed"])
    if made.config["compile"]:
        compile_cell(model)
    optimizer = made.make_optimizer(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for deq in deqs_of(model):
        deq.clock = nullcontext
    return Variant(
        label=setting.label,
        plan=made,
        model=model,
        grad=made.deq.grad,
        device=device,
        batch=batch,
        carry=carry,
        optimizer=optimizer,
    )


def _set_form(model: nn.Module, speed: str) -> None:
    if speed not in FORMS:
        return
    cell = getattr(model, "cell", None)
    if not hasattr(cell, FORMS[speed]):
        raise ConfigError(f"speed={speed} needs a model whose cell has that form, as that of an MDEQ: leave it out")
    with as_config_error():
        getattr(cell, FORMS[speed])()


def _kind_of(leaf: str) -> str:
    """Return the kind of task a model leaf serves; of a family, the first that has a synthetic batch."""
    if leaf not in CONFIGS.leaves("model"):
        return next(iter(batches.DATA))  # the plan names the leaf and those that exist
    kinds = kinds_of_model(CONFIGS.read("model", leaf))
    known = [kind for kind in kinds if kind in batches.DATA]
    if not known:
        raise ConfigError(f"the benchmark has batches for {', '.join(batches.DATA)}, not {', '.join(kinds)}")
    return known[0]


def for_peer(setting: Setting) -> Setting:
    """Return the setting as a user of another library would run it: eager, in PyTorch's own memory format.

    Its number format is float32, or TF32 where ours is anything else (the same on a CPU).
    """
    config = _eager(setting)
    if "channels_last" in config["model"]:
        config["model"]["channels_last"] = False
    config |= {"gradient_precision": None, "precision": "fp32" if config["precision"] == "fp32" else "tf32"}
    return _with_config(setting, config)


def eager(setting: Setting) -> Setting:
    """Return the setting without compiled code and CUDA graphs."""
    return _with_config(setting, _eager(setting))


def _eager(setting: Setting) -> dict[str, Any]:
    config = copy.deepcopy(setting.plan.config) | {"compile": False, "cuda_graph": False, "speed": "off"}
    for solver in (config["solver"], config["adjoint_solver"], config["grad"].get("solver")):
        if solver is not None:
            solver |= {name: False for name in ("compile", "kernels") if name in solver}
    return config


def _with_config(setting: Setting, config: dict[str, Any]) -> Setting:
    made = plan_of(config, configs=CONFIGS, choices=setting.plan.choices, overrides=setting.plan.overrides)
    return replace(setting, plan=made)


def work_of(variant: Variant, score: Score) -> list[Work]:
    """Return what each solve of a finished step (backward included) needed of f."""
    graph = variant.graph_evals()
    return [Work(s.stats.num_evals - graph, graph, s.stats.num_vjps) for s in score.solutions]


def _count(key: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{key}={value} must be an integer >= 1")
    return int(value)


def _flag(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ConfigError(f"{key}={value} must be true or false")
    return value.lower() == "true"
