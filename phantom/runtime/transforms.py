"""States under torch.func and forward mode: f sees wrapped tensors, solvers see plain ones.

torch.func wraps a tensor once per transform. A solve needs the numbers alone, so every evaluation of f unwraps its
value; the problems of a vmap become rows, (N, B, D) as (N B, D), and stop one by one like all others.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportArgumentType=false
# torch has no types for the functions of torch.func below

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
    temporarily_restore_interpreter_stack,
)
from torch.autograd import forward_ad

from phantom.solution import Stats
from phantom.solve import Watch
from phantom.solve import solve as solve_rows
from phantom.solver.base import Solver
from phantom.state import FlatMap


def are_active() -> bool:
    """Return whether a transform of torch.func or a level of forward mode surrounds the caller."""
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_forward_mode() -> bool:
    """Return whether forward mode surrounds the caller, which differentiates under `torch.no_grad()`, too."""
    return torch._C._is_fwd_grad_enabled() and Levels().is_forward


def is_linearized() -> bool:
    """Return whether torch.func.linearize surrounds the caller: forward mode whose operators are recorded."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None and Levels().is_forward


def is_grads_batched(g: Tensor) -> bool:
    """Return whether `g` holds the cotangents of `torch.autograd.grad(..., is_grads_batched=True)`."""
    return torch._C._dispatch_keys(g).has(torch._C._parse_dispatch_key("Batched"))


def on_batch(function: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
    """Return `function` of the plain (K, B, D) tensor that such a `g` (B, D) stands for, in the form of `g`."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    found = function(torch._remove_batch_dim(g, level, 1, 0))
    return torch._add_batch_dim(found, 0, level)


class Levels:
    """The transforms around the caller.

    Attributes:
        orders: how many of them differentiate.
        is_forward: whether one of these is forward mode.
    """

    def __init__(self) -> None:
        stack = retrieve_all_functorch_interpreters() if functorch.peek_interpreter_stack() is not None else []
        kinds = [(interpreter.key().name, interpreter) for interpreter in stack]
        self._batched = [(level.level(), level.batch_size()) for name, level in kinds if name == "Vmap"]
        names = [name for name, _ in kinds]
        # func.jvp opens a dual level of its own
        forward = max(names.count("Jvp"), int(forward_ad._current_level >= 0))
        self.orders, self.is_forward = names.count("Grad") + forward, forward > 0

    def rows(self, t: Tensor) -> Tensor:
        """Return the numbers of `t`, (B, ...) under the transforms, as a plain (N B, ...)."""
        axes: list[int | str] = [*range(t.dim())]
        while functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_batchedtensor(t):
                axes.insert(functorch.maybe_get_bdim(t), f"vmap {functorch.maybe_get_level(t)}")
            t = functorch.get_unwrapped(t)
        with temporarily_clear_interpreter_stack():
            if forward_ad._current_level >= 0:
                t = forward_ad.unpack_dual(t).primal
            for level, size in self._batched:
                if f"vmap {level}" not in axes:
                    t = t.expand(size, *t.shape)
                    axes.insert(0, f"vmap {level}")
            own = [axes.index(f"vmap {level}") for level, _ in self._batched]
            order = [*own, *(axes.index(i) for i in range(len(axes) - len(own)))]
            return t.permute(order).flatten(0, len(own))

    def wrap(self, rows: Tensor) -> Tensor:
        """Return plain `rows` (N B, ...) as a constant of the transforms, (B, ...)."""
        if not self._batched:
            return rows
        with temporarily_clear_interpreter_stack():
            t = rows.unflatten(0, (*(size for _, size in self._batched), -1))
        for level, _ in self._batched:
            t = functorch._add_batch_dim(t, 0, level)
        return t

    def constant(self, t: Tensor) -> Tensor:
        """Return `t` without any derivative."""
        return self.wrap(self.rows(t).detach())

    @contextmanager
    def aside(self, f: FlatMap) -> Iterator[FlatMap]:
        """Put the transforms aside, and give f as a map of plain rows that takes them up again."""
        with temporarily_clear_interpreter_stack() as stack:
            self.around = partial(temporarily_restore_interpreter_stack, stack)
            # those that surround a solve are nobody's inside of it; f may have some of its own
            tangents = torch._C._is_fwd_grad_enabled() and not self.is_forward

            def f_rows(z: Tensor) -> Tensor:
                with self.around(), forward_ad._set_fwd_grad_enabled(tangents):
                    return self.rows(f(self.wrap(z)))

            yield f_rows


def solve(
    f: FlatMap,
    z0: Tensor,
    solver: Solver,
    *,
    watch: Watch | None,
    **settings: Any,
) -> tuple[Tensor, Stats, Any]:
    """Return what `phantom.solve.solve` with these `settings` returns, the iterate as a constant of the transforms.

    The statistics are those of the rows: B for each instance of a vmap.
    """
    levels = Levels()
    start = levels.rows(z0)
    watch_rows = None if watch is None else partial(_watch_wrapped, levels, watch)
    with levels.aside(f) as f_rows:
        z_star, stats, history = solve_rows(f_rows, start, solver, watch=watch_rows, **settings)
    return levels.wrap(z_star), stats, history


def _watch_wrapped(levels: Levels, watch: Watch, step: int, best: Tensor) -> None:
    with levels.around():
        watch(step, levels.wrap(best))
