"""Modules that take the place of a model's DEQ: the floor of a step, and a wrapper that counts evaluations of f."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phantom import DEQ, Solution, State, Stats
from phantom.deq import Clock
from phantom.runtime.frozen import frozen
from phantom.state import Map, Packing
from scripts.bench.instruments import Tracer


@dataclass(frozen=True)
class Work:
    """What one solve and its gradient need of f.

    Args:
        evals: evaluations without a graph.
        graph_evals: evaluations with a graph, each followed by its ordinary backward.
        vjps: vector-Jacobian products of the estimator.
    """

    evals: int
    graph_evals: int
    vjps: int


class Floor(nn.Module):
    """Do the work of a DEQ and nothing else: no solver arithmetic, no packing, no statistics.

    A step of a model with this in place of its DEQ costs n_evals x F without a graph + graph evaluations x (F forward
    and backward) + vjps + stem and head: what the method costs at least with this cell.

    Args:
        work: per solve of one forward pass, in order.
        gradient_precision: autocast of the evaluations with a graph, as in `phantom.fixed_point`.
    """

    def __init__(self, work: Iterable[Work], clock: Clock, gradient_precision: torch.dtype | None) -> None:
        super().__init__()
        self.work = tuple(work)
        self.clock = clock
        self.gradient_precision = gradient_precision
        self._call = 0

    def forward(self, f: Map, z0: State, *, in_place: bool = False) -> Solution:
        work = self.work[self._call % len(self.work)]
        self._call += 1
        z = z0
        with self.clock("solve"), torch.no_grad():
            for _ in range(work.evals):
                z = f(z)
            torch.clear_autocast_cache()  # casts made under no_grad have no graph
        cast = nullcontext()
        if self.gradient_precision is not None:
            cast = torch.autocast((z0[0] if isinstance(z0, tuple) else z0).device.type, dtype=self.gradient_precision)
        # as in the adjoint estimators, whose products have an evaluation of their own where f is compiled
        stance = torch.compiler.set_stance("force_eager") if work.vjps else nullcontext()
        with self.clock("attach"), cast, stance:
            parts = z if isinstance(z, tuple) else (z,)
            # the adjoint family differentiates f to its input even where nothing below it asks for that
            start = tuple(part.detach().requires_grad_(work.vjps > 0) for part in parts)
            value = start if isinstance(z, tuple) else start[0]
            for _ in range(work.graph_evals):
                value = f(value)
            outputs = _parts(value, like=parts)
            value = outputs if isinstance(z, tuple) else outputs[0]
        with self.clock("backward"):
            u = tuple(part.detach() for part in outputs)
            if work.vjps and (held := frozen(f)) is not None:
                start = tuple(part.detach().requires_grad_() for part in start)
                with cast:
                    outputs = _parts(held(start if isinstance(z, tuple) else start[0]), like=parts)
            for _ in range(work.vjps):
                u = torch.autograd.grad(outputs, start, u, retain_graph=True)
        return Solution(value=value, z0=z0, z_star=z, stats=Stats.of_no_solve(Packing(z0).pack(z0)))


def _parts(value: State, *, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = value if isinstance(value, tuple) else (value,)
    return tuple(out.to(part.dtype) for out, part in zip(outputs, like, strict=True))


class Traced(nn.Module):
    """Hand f to the DEQ with every evaluation marked for a tracer."""

    def __init__(self, inner: nn.Module, tracer: Tracer) -> None:
        super().__init__()
        self.inner = inner
        self._tracer = tracer

    def forward(self, f: Map, z0: State, *, in_place: bool = False) -> Solution:
        def marked(z: State) -> State:
            with self._tracer.evaluation():
                return f(z)

        return self.inner(marked, z0, in_place=in_place)


def replace_deq(model: nn.Module, make: Callable[[DEQ], nn.Module]) -> nn.Module:
    """Return a copy of the model with `make(deq)` in the place of its DEQ; all else is shared, a compiled cell too.

    Raises:
        ValueError: the model has none.
    """
    names = [name for name, child in model.named_children() if isinstance(child, DEQ)]
    if not names:
        raise ValueError(f"{type(model).__name__} holds no DEQ to replace")
    changed = copy.copy(model)
    changed._modules = dict(model._modules)
    for name in names:
        setattr(changed, name, make(getattr(model, name)))
    return changed
