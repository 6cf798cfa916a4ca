"""What makes a run fast: what the config may ask for, what the run chooses by itself on a GPU, and how a model gets it.

Compile f, replay steps as CUDA graphs, use own kernels, pad channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._functorch import config as functorch_config

from phantom import Solver
from phantom.deq import deqs_of
from phantom.engine.errors import ConfigError, as_config_error
from phantom.engine.machine.compiler import can_compile, check_compiler
from phantom.engine.tasks import Task
from phantom.engine.training.rules import Rules
from phantom.validate import check_triton

if TYPE_CHECKING:
    from phantom.engine.plan import Plan  # which imports the first check from here

SPEEDS = ("auto", "off", "kernels", "padded")
# optimiser steps from which on it pays: compiling f takes about a minute, which steps of a few hundredths of a second
# less earn back; capturing a graph takes a few ordinary steps
COMPILE_PAYS, GRAPH_PAYS = 2000, 100


@dataclass(frozen=True)
class Speed:
    """What a run does to be fast.

    Args:
        compile: f is compiled.
        cuda_graph: forward and backward are replayed as CUDA graphs.
        kernels: own kernels serve: the cell's in evaluations without a graph, and those of the solvers that have some.
        padded: the convolutions of the cell see padded channels.
        reason: says why, in words.
    """

    compile: bool
    cuda_graph: bool
    kernels: bool
    padded: bool
    reason: str

    def __str__(self) -> str:
        on = {
            "f is compiled": self.compile,
            "steps are CUDA graphs, where a solve takes all its max_steps": self.cuda_graph,
            "own kernels": self.kernels,
            "padded channels": self.padded,
        }
        return f"speed: {', '.join(name for name, is_on in on.items() if is_on) or 'f runs as written'} ({self.reason})"


def obstacles_to_graphs(config: dict[str, Any], task: Task) -> list[str]:
    """Return what the config would have to say for steps of a fixed shape that never wait for the host, in words."""
    found = [f"{name}=null" for name in ("penalty", "jitter", "course") if config[name] is not None]
    found += ["accumulate=1"] if config["accumulate"] != 1 else []
    return found + ([] if task.fixed_shapes else [f"batches of a fixed shape, which {task.kind} does not have"])


def check_cuda_graph(config: dict[str, Any], task: Task) -> None:
    """Check that a training step can be a CUDA graph, where the config asks for one.

    Raises:
        ConfigError: names what to change.
    """
    if config["cuda_graph"] and (found := obstacles_to_graphs(config, task)):
        raise ConfigError(f"cuda_graph=true replays one fixed sequence of kernels: it needs {', '.join(found)}")


def check_speed(config: dict[str, Any], device: torch.device, world_size: int) -> None:
    """Check that this machine has what the config asks for by name.

    Raises:
        ConfigError: it has no GPU, several processes, no Triton or no compiler.
    """
    if config["cuda_graph"] and (device.type != "cuda" or world_size > 1):
        raise ConfigError("cuda_graph=true needs a GPU and one process; leave it out here")
    if config["speed"] in ("kernels", "padded") and device.type != "cuda":
        raise ConfigError(f"speed={config['speed']} needs a GPU: use speed=auto here")
    if config["speed"] == "kernels":
        with as_config_error(prefix="speed=kernels: "):
            check_triton()
    names = _asked(config, "compile")
    if config["compile"]:
        names.insert(0, "compile")
    if names:
        with as_config_error():
            check_compiler(device, names[0])


def check_kernels(config: dict[str, Any], device: torch.device) -> None:
    """Check that the solvers have a GPU for the kernels that the config gives them, in training and evaluation.

    Raises:
        ConfigError: they have none.
    """
    names = _asked(config, "kernels")
    if names and device.type != "cuda":
        raise ConfigError(f"{names[0]}=true needs a GPU: {names[0]}=false is the same solver anywhere")


def _asked(config: dict[str, Any], flag: str) -> list[str]:
    """Return the keys of the solvers whose `flag` is set."""
    solvers = {"solver": config["solver"], "adjoint_solver": config["grad"].get("solver")}
    solvers["eval_solver"] = config["eval_solver"]
    return [f"{name}.{flag}" for name, solver in solvers.items() if solver is not None and solver.get(flag)]


def choose_speed(plan: Plan, model: nn.Module, steps: int, device: torch.device, world_size: int) -> Speed:
    """Return what a run does to be fast; `compile` and `cuda_graph` of the config win where they are not null.

    A cell has kernels where it has a method `fuse`, and can pad its channels where it has `pad`. Nothing changes here.

    Args:
        steps: optimiser steps of the run.

    Raises:
        ConfigError: speed=kernels, and neither the cell nor the solver has any; speed=padded, and the cell has no
            `pad`.
    """
    compiles, graphs, asked = (plan.config[key] for key in ("compile", "cuda_graph", "speed"))
    cell = getattr(model, "cell", None)
    kernels, padded = asked == "kernels", asked == "padded"
    fuses = kernels and hasattr(cell, "fuse")
    if kernels and not (fuses or hasattr(plan.deq.solver, "kernels")):
        raise ConfigError(
            "speed=kernels needs a model whose cell has kernels, as that of an MDEQ, or solver=broyden: use speed=auto"
        )
    if padded and not hasattr(cell, "pad"):
        raise ConfigError("speed=padded needs a model whose cell pads its channels, as that of an MDEQ: use speed=auto")
    if asked == "off" or device.type != "cuda":
        reason = "speed=off" if asked == "off" else "there is nothing to choose on a CPU"
        return Speed(bool(compiles), bool(graphs), kernels=False, padded=False, reason=reason)
    reasons = []
    if compiles is None:
        compiles = False
        if cell is None:
            reasons.append("the model has no module `cell` to compile")
        elif steps < COMPILE_PAYS:
            reasons.append(f"{steps} steps do not earn the time to compile, {COMPILE_PAYS} do")
        elif not fuses and not (compiles := can_compile(device)):
            reasons.append("torch cannot compile here")
    if graphs is None:
        obstacles = obstacles_to_graphs(plan.config, plan.task)
        graphs = world_size == 1 and not obstacles and steps >= GRAPH_PAYS
        if world_size > 1:
            reasons.append("CUDA graphs take one process")
        elif obstacles:
            reasons.append(f"CUDA graphs need {', '.join(obstacles)}")
        elif not graphs:
            reasons.append(f"{steps} steps do not earn a graph, {GRAPH_PAYS} do")
    return Speed(compiles, graphs, kernels, padded, reason="; ".join(reasons) or f"speed={asked}")


def speed_up(model: nn.Module, rules: Rules, speed: Speed) -> Rules:
    """Give the cell and the solvers of a model what was chosen; CUDA graphs are the trainer's.

    Return the rules, which go on to share their solver and estimator with the layers that they govern.

    Raises:
        ConfigError: f is to be compiled, and the model has no module `cell`.
    """
    cell: Any = getattr(model, "cell", None)
    if speed.kernels and hasattr(cell, "fuse"):
        cell.fuse()
    if speed.padded:
        cell.pad()
    if speed.compile:
        compile_cell(model)
    return _speed_up_solvers(model, rules, speed)


def _speed_up_solvers(model: nn.Module, rules: Rules, speed: Speed) -> Rules:
    """Let the solvers of the config fuse their arithmetic, or use the kernels that they have."""
    chosen = [name for name in ("compile", "kernels") if getattr(speed, name)]

    def fast(solver: Any) -> Any:
        names = [name for name in chosen if hasattr(solver, name)] if isinstance(solver, Solver) else []
        return replace(solver, **dict.fromkeys(names, True)) if names else solver

    def with_fast(grad: Any) -> Any:
        return replace(grad, solver=fast(grad.solver)) if chosen and hasattr(grad, "solver") else grad

    faster = replace(rules, solver=fast(rules.solver), grad=with_fast(rules.grad))
    for deq in filter(rules.govern, deqs_of(model)):
        deq.solver, deq.eval_solver, deq.grad = faster.solver, fast(deq.eval_solver), faster.grad
    return faster


def compile_cell(model: nn.Module) -> None:
    """Compile f: torch compiles the module `cell` to one graph; its `forward` takes everything that varies as argument.

    Changes two settings of torch for the whole process, `donated_buffer` and `recompile_limit`.

    Raises:
        ConfigError: the model has no such module.
    """
    cell = getattr(model, "cell", None)
    if not isinstance(cell, nn.Module):
        raise ConfigError(f"compile=true needs a model whose f is one module, `cell`; {type(model).__name__} has none")
    # adjoint estimators and diagnostics run the backward of one evaluation of f several times
    functorch_config.donated_buffer = False
    # torch.compile makes one graph per shape and grad mode. Text needs many: the memory grows and the last segment is
    # short
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    cell.compile(fullgraph=True, dynamic=False)
