"""A solver is its settings and its update rule; `phantom.solve.solve` is the loop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from phantom.residual import Norm, Stop
from phantom.validate import check_choice, check_count, is_number


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Find z with f(z) = z, for B independent problems at once.

    Args:
        max_steps: largest number of steps; a solve costs `max_steps + 1` evaluations of f at most.
        tol: a problem stops changing once its residual is below this; None runs the fixed budget, without any
            device-to-host synchronisation inside the loop.
        stop: measure the residual relative to |f(z)|, or absolutely.
        norm: per problem, `l2`, `rms` (l2 / sqrt(D)) or `max`.
        sync_every: with a `tol`, ask the device every so many steps whether all problems have stopped.
        compile: fuse the solver's own arithmetic; a minute at the first solve, and worth it on a GPU.
    """

    measures_residual: ClassVar[bool] = True  # False: `solve` calls `roll_out`, and returns the last iterate

    max_steps: int
    tol: float | None
    stop: Stop = "relative"
    norm: Norm = "l2"
    sync_every: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps, least=0)
        check_count("sync_every", self.sync_every, least=1)
        if self.tol is not None and not (is_number(self.tol) and math.isfinite(self.tol) and self.tol >= 0):
            raise ValueError(f"tol={self.tol!r} must be a number >= 0, or null for a fixed budget of steps")
        check_choice("stop", self.stop, get_args(Stop))
        check_choice("norm", self.norm, get_args(Norm))
        if not isinstance(self.compile, bool):
            raise ValueError(f"compile={self.compile!r} must be true or false")

    @abstractmethod
    def start(self, z: Tensor, g: Tensor) -> Any:
        """Return the memory of a solve that begins at `z` (B, D) with residual vector g = f(z) - z."""

    @abstractmethod
    def propose(self, memory: Any, z: Tensor, g: Tensor) -> Tensor:
        """Return the next iterate (B, D) from the current one and its g = f(z) - z, updating `memory` in place.

        The next iterate is memory of the solver's own: f may reuse what it returns, and the loop writes to iterates.
        `z` may be the best one so far and is not written to; `g` is not needed afterwards, and may be.
        """


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled, the same object for every solve."""
    return torch.compile(function, fullgraph=True)
