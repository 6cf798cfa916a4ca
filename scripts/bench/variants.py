"""From a command line to training steps: composing configs, synthetic batches, and one `Variant` per combination."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hydra
import torch
from torch import nn

from phantom import BPTT, UPG, GradientEstimator
from phantom.deq import _no_clock, deqs_of
from phantom.engine import build, command
from phantom.engine.config import instantiate, values
from phantom.engine.errors import ConfigError
from phantom.engine.machine import precision
from phantom.engine.source import Spec
from phantom.engine.tasks.base import Score
from phantom.engine.training.cuda_graph import EAGER, StepGraphs
from scripts.bench import batches
from scripts.bench.standins import Work
from scripts.bench.unhoisted import UnhoistedCell

# keys of the benchmark itself; all others are those of train.py
OWN = {"batch": "32", "size": "32", "classes": "10", "hoist": "true"}
# a fixed budget, unless the command line says otherwise: equal work is what can be compared
FIXED = ("solver.tol", "adjoint_solver.tol")
# training moves the weights, and a benchmark wants every step alike
RATE = 1e-6


@dataclass(frozen=True)
class Setting:
    """One combination of a sweep: config, and the keys of the benchmark.

    Args:
        label: what tells it from the others.
    """

    label: str
    config: dict[str, Any]
    batch: int
    size: int
    classes: int
    hoist: bool


@dataclass
class Variant:
    """A model with its optimiser and its batch, ready to step."""

    label: str
    model: nn.Module
    grad: GradientEstimator
    precision: str
    device: torch.device
    batch: Any
    carry: Any
    score: Callable[[nn.Module, Any, Any], Score]
    optimizer: torch.optim.Optimizer
    graphs: StepGraphs | None = None
    phase: Callable[[str], Any] = _no_clock

    def step(self, phase: Callable[[str], Any]) -> Score:
        """Take one training step, its phases marked by `phase`."""
        self.phase = phase
        precision.set_up(self.precision, deterministic=False)
        with phase("rest"):
            score = (self.graphs or self._forward_backward)(self.batch)
            with phase("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
        return score

    def replay(self, clock: Any) -> None:
        """Capture forward and backward as a CUDA graph, and replay it from now on."""
        self.graphs = StepGraphs(
            self._forward_backward,
            deqs=deqs_of(self.model),
            parameters=list(self.model.parameters()),
            timer=clock,
        )
        for _ in range(EAGER + 1):
            self.step(clock.phase)

    def _forward_backward(self, batch: Any) -> Score:
        with precision.autocast(self.precision, self.device):
            score = self.score(self.model, batch, self.carry)
        loss = score.tally.loss_sum / score.tally.count
        with self.phase("backward"):
            loss.backward()
        return score.detach()

    def graph_evals(self) -> int:
        """Return how often f is evaluated with a graph, per solve."""
        return self.grad.k if isinstance(self.grad, UPG) else self.grad.num_steps if isinstance(self.grad, BPTT) else 1


def settings(arguments: Sequence[str]) -> list[Setting]:
    """Return one setting per combination of the sweep; `k` and `lam` vary only where the estimator has them.

    Raises:
        ConfigError: an unknown key or an impossible value.
    """
    jobs = [dict(item.split("=", 1) for item in job) for job in command.expand(arguments)]
    varying = [key for key in jobs[0] if len({job[key] for job in jobs}) > 1]
    found: dict[str, Setting] = {}
    for job in jobs:
        own = {key: job.get(key, default) for key, default in OWN.items()}
        overrides = {key.lstrip("+"): value for key, value in job.items() if key not in OWN}
        uses = compose({key: value for key, value in overrides.items() if key not in values.ESTIMATOR_KEYS})
        overrides = {key: value for key, value in overrides.items() if key not in values.ESTIMATOR_KEYS or key in uses}
        config = compose(overrides)
        names = [config["grad"]["_target_"].rsplit(".", 1)[-1].lower()]
        names += [f"{key}={config[key]}" for key in ("k",) if key in config]
        kept = [key for key in varying if key not in ("grad", "k") and (key in overrides or key in OWN)]
        label = " ".join(names + [f"{key}={job[key]}" for key in kept])
        numbers = {key: _count(key, own[key]) for key in ("batch", "size", "classes")}
        hoist = _flag("hoist", own["hoist"])
        found.setdefault(label, Setting(label=label, config=config, hoist=hoist, **numbers))
    return list(found.values())


def compose(overrides: dict[str, str]) -> dict[str, Any]:
    """Return the resolved config of train.py without data, with a fixed budget unless `overrides` say otherwise."""
    fixed = [f"{key}=null" for key in FIXED if key not in overrides]
    items = [*(f"{key}={value}" for key, value in overrides.items()), *fixed, "~data"]
    with hydra.initialize_config_dir(str(command.CONFIGS), version_base="1.3"):
        try:
            cfg = hydra.compose("train", overrides=items)
        except Exception as error:
            raise ConfigError(" ".join(str(error).split())) from error
    return instantiate.resolve(cfg)


def make(setting: Setting, device: torch.device) -> Variant:
    """Build the variant: the same initial weights and the same batch for every setting of the same shape."""
    config = setting.config
    kind = kind_of(config["model"])
    inputs, batch = batches.make(kind, batch=setting.batch, size=setting.size, classes=setting.classes)
    spec = Spec(kind=kind, inputs=inputs, sizes={})
    deq = build.build_deq(config)
    torch.manual_seed(config["seed"])
    model = build.build_model(config, spec, deq).to(device)
    batch = tuple(part.to(device) for part in batch)
    carry = batches.full_memory(model, batch) if kind == "language_modelling" else None
    if not setting.hoist:
        if kind != "language_modelling" or config["compile"]:
            raise ConfigError("hoist=false is for the DEQ Transformer, and not for compile=true")
        model.cell = UnhoistedCell(model.cell)
    if config["compile"]:
        build.compile_cell(model)
    optimizer = build.instantiate(config["optimizer"], "optimizer")(list(model.parameters()))
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return Variant(
        label=setting.label,
        model=model,
        grad=deq.grad,
        precision=config["precision"],
        device=device,
        batch=batch,
        carry=carry,
        score=build.build_task(kind).score,
        optimizer=optimizer,
    )


def kind_of(model: dict[str, Any]) -> str:
    """Return the kind of task a model leaf serves; of a family, the first that has a synthetic batch."""
    kinds = instantiate.locate(model["_target_"]).kinds if "_target_" in model else list(model)
    known = [kind for kind in kinds if kind in batches.KINDS]
    if not known:
        raise ConfigError(f"the benchmark has batches for {', '.join(batches.KINDS)}, not {', '.join(kinds)}")
    return known[0]


def for_peer(setting: Setting) -> Setting:
    """Return the setting as a user of another library would run it: eager, in PyTorch's own memory format.

    Its number format is float32, or TF32 where ours is anything else (the same on a CPU).
    """
    config = copy.deepcopy(setting.config)
    if "channels_last" in config["model"]:
        config["model"]["channels_last"] = False
    config |= {"compile": False, "cuda_graph": False, "gradient_precision": None}
    for solver in (config["solver"], config["adjoint_solver"], config["grad"].get("solver")):
        if solver is not None:
            solver["compile"] = False
    config["precision"] = "fp32" if config["precision"] == "fp32" else "tf32"
    return replace(setting, config=config)


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
