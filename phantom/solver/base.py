"""A solver is its settings and its update rule; `phantom.solve.solve` is the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from phantom.residual import Norm, Stop
from phantom.validate import check_choice, check_count, check_flag, check_number


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Find z with f(z) = z, for B independent problems at once.

    Args:
        max_steps: largest number of steps; a solve costs `max_steps + 1` evaluations of f at most.
        tol: a problem stops changing once its residual is this or less; None runs the fixed budget, without any
            device-to-host synchronisation inside the loop.
        stop: measure |f(z) - z| relative to the larger of |f(z)| and |f(z0)|, or absolutely. Only an iterate where
            |f(z) - z| is below its first value can be a solution, or a start that meets `tol` itself.
        norm: per problem, `l2`, `rms` (l2 / sqrt(D)) or `max`.
        sync_every: with a `tol`, ask the device every so many steps whether all problems have stopped. None never asks,
            and never waits: the solve takes all `max_steps`, and holds each problem where it stopped. The state and the
            statistics of a problem are those of `sync_every=1`, unless it depends on others. A solve that a CUDA graph
            captures never asks, whatever is said here.
        compile: fuse the solver's own arithmetic; a minute at the first solve, and worth it on a GPU.
    """

    max_steps: int = 50
    tol: float | None = 1e-4
    stop: Stop = "relative"
    norm: Norm = "l2"
    sync_every: int | None = 1
    compile: bool = False

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps, least=0)
        never = ", or None (null in YAML) never to ask the device"
        check_count("sync_every", self.sync_every, least=1, also=never, optional=True)
        if self.tol is not None:
            check_number("tol", self.tol, ">= 0", also=", or None (null in YAML) for a fixed budget")
        check_choice("stop", self.stop, get_args(Stop))
        check_choice("norm", self.norm, get_args(Norm))
        check_flag("compile", self.compile)

    @property
    def asks(self) -> bool:
        """Whether a solve waits for the device to tell which problems go on."""
        return self.tol is not None and self.sync_every is not None and not _is_captured()

    @abstractmethod
    def start(self, z: Tensor, g: Tensor) -> Any:
        """Return the memory of a solve that begins at `z` (B, D) with residual vector g = f(z) - z.

        It is called again, with (1, B D), where the problems turn out to depend on each other and are solved as one.
        """

    @abstractmethod
    def propose(self, memory: Any, z: Tensor, g: Tensor) -> Tensor:
        """Return the next iterate (B, D) from the current one and its g = f(z) - z, updating `memory` in place.

        Return new memory, never a view of `z`: the loop may keep `z` as the best iterate, and f may reuse its output
        buffer. You may overwrite `g`.
        """


def _is_captured() -> bool:
    """Return whether a CUDA graph records what is launched now; torch asks a driver that need not be there."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled, the same object for every solve."""
    return torch.compile(function, fullgraph=True)
