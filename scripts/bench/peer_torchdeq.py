"""The same model through torchdeq, used as its documentation shows: `deq = get_deq(...)`, `z, info = deq(f, z0)`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from phantom import DEQ, UPG, Anderson, Broyden, FixedPoint, GradientEstimator, Implicit, Solution, Solver, State, Stats
from phantom.state import Map, Packing

_SOLVERS = {Broyden: "broyden", Anderson: "anderson", FixedPoint: "fixed_point_iter"}
# far below any residual: the number of iterations decides, as in a fixed budget
_NEVER = 1e-30


class PeerError(ValueError):
    """torchdeq is not installed, or has nothing that corresponds to the variant."""


class TorchDEQ(nn.Module):
    """Take the place of a model's `DEQ`: the same f, z0, number of iterations, k and lam, solved by torchdeq.

    torchdeq evaluates f at z0 and once per iteration, as we do: `max_steps` steps are `max_steps` iterations, forward
    and backward. Its UPG is `grad=k, tau=lam`, its implicit differentiation `ift=True`; it has no Neumann gradient.

    Raises:
        PeerError: see the class.
    """

    def __init__(self, deq: DEQ) -> None:
        super().__init__()
        self.clock = nullcontext
        self._deq = counterpart(deq)
        self._solve = self._deq.f_solver
        self._deq.f_solver = self._timed_solve

    def forward(self, f: Map, z0: State, *, in_place: bool = False) -> Solution:
        many = isinstance(z0, tuple)
        with self.clock("attach"):
            out, _ = self._deq((lambda *z: list(f(z))) if many else f, list(z0) if many else z0)
        value = tuple(out[-1]) if many else out[-1]
        return Solution(value=value, z0=z0, z_star=value, stats=Stats.of_no_solve(Packing(z0).pack(z0)))

    def _timed_solve(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("solve"), torch.no_grad():
            return self._solve(*args, **kwargs)


def counterpart(deq: DEQ) -> nn.Module:
    """Return torchdeq's layer with the settings of `deq`.

    Raises:
        PeerError: torchdeq is not installed, or has nothing that corresponds.
    """
    try:
        from torchdeq import get_deq
    except ImportError as error:
        raise PeerError(
            "peer=torchdeq needs that library: `pip install --no-deps torchdeq`, or into a folder of its own, "
            "`pip install --no-deps --target peers torchdeq`, with PYTHONPATH=peers"
        ) from error
    forward = {f"f_{key}": value for key, value in stopping(deq.solver).items()}
    return get_deq(f_solver=_name(deq.solver), **forward, **_gradient(deq.grad))


def stopping(solver: Solver) -> dict[str, Any]:
    """Return when a solver of torchdeq's stops where `solver` does; a fixed budget is a tolerance never met."""
    stop = {"max_iter": solver.max_steps, "tol": _NEVER}
    return stop if solver.tol is None else {**stop, "tol": solver.tol, "stop_mode": solver.stop[:3]}


def has_counterpart(grad: GradientEstimator) -> bool:
    """Return whether torchdeq offers this gradient."""
    return isinstance(grad, (UPG, Implicit))


def _gradient(grad: GradientEstimator) -> dict[str, Any]:
    if isinstance(grad, UPG):
        return {"grad": grad.k, "tau": grad.lam, "b_tol": _NEVER}
    if isinstance(grad, Implicit):
        backward = {f"b_{key}": value for key, value in stopping(grad.solver).items()}
        return {"ift": True, "b_solver": _name(grad.solver), **backward}
    raise PeerError(f"torchdeq has no counterpart of {grad}; it has UPG and implicit differentiation")


def _name(solver: Solver) -> str:
    if type(solver) not in _SOLVERS:
        raise PeerError(f"torchdeq has no counterpart of {solver}")
    return _SOLVERS[type(solver)]
