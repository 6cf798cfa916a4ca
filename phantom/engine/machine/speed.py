"""What makes a run fast on a GPU, chosen by the run itself: compile f, replay steps as CUDA graphs, use own kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def choose_speed(
    config: Mapping[str, Any],
    *,
    on_gpu: bool,
    world_size: int,
    steps: int,
    cell: object | None,
    solver_has_kernels: bool,
    obstacles: Sequence[str],
    can_compile: Callable[[], bool],
) -> Speed:
    """Return what a run does to be fast; `compile` and `cuda_graph` of the config win where they are not null.

    Args:
        config: the root keys `speed`, `compile` and `cuda_graph`.
        steps: optimiser steps of the run.
        cell: the module that computes f, if the model has one; it has kernels where it has a method `fuse`, and
            can pad its channels where it has `pad`.
        solver_has_kernels: whether the solver of the model has some.
        obstacles: what CUDA graphs would need of the config, in words.
        can_compile: tries whether torch can compile here; seconds.

    Raises:
        ValueError: speed=kernels, and neither the cell nor the solver has any; speed=padded, and the cell has no `pad`.
    """
    compiles, graphs, asked = config["compile"], config["cuda_graph"], config["speed"]
    kernels, padded = asked == "kernels", asked == "padded"
    fuses = kernels and hasattr(cell, "fuse")
    if kernels and not (fuses or solver_has_kernels):
        raise ValueError(
            "speed=kernels needs a model whose cell has kernels, as that of an MDEQ, or solver=broyden: use speed=auto"
        )
    if padded and not hasattr(cell, "pad"):
        raise ValueError("speed=padded needs a model whose cell pads its channels, as that of an MDEQ: use speed=auto")
    if asked == "off" or not on_gpu:
        reason = "speed=off" if asked == "off" else "there is nothing to choose on a CPU"
        return Speed(bool(compiles), bool(graphs), kernels=False, padded=False, reason=reason)
    reasons = []
    if compiles is None:
        compiles = False
        if cell is None:
            reasons.append("the model has no module `cell` to compile")
        elif steps < COMPILE_PAYS:
            reasons.append(f"{steps} steps do not earn the time to compile, {COMPILE_PAYS} do")
        elif not fuses and not (compiles := can_compile()):
            reasons.append("torch cannot compile here")
    if graphs is None:
        graphs = world_size == 1 and not obstacles and steps >= GRAPH_PAYS
        if world_size > 1:
            reasons.append("CUDA graphs take one process")
        elif obstacles:
            reasons.append(f"CUDA graphs need {', '.join(obstacles)}")
        elif not graphs:
            reasons.append(f"{steps} steps do not earn a graph, {GRAPH_PAYS} do")
    return Speed(compiles, graphs, kernels, padded, reason="; ".join(reasons) or f"speed={asked}")
