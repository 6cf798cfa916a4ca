"""Measure spectral radius and gradient quality on a training batch, without disturbing the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from phantom import GradientEstimator, Implicit, Solution
from phantom.deq import deqs_of
from phantom.diagnostics import cosine, damped_radius, norm_ratio, ritz_values
from phantom.engine.tasks.base import Task
from phantom.solver.base import Solver
from phantom.validate import check_count

Call = tuple[Any, Solution]
UNSOLVED = 1e-2


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Every `every` steps, measure the map and the estimator on the batch that was just trained on.

    Args:
        every: steps between measurements.
        radius_steps: vjps of the Arnoldi estimate of the spectral radius; 0 leaves it out.
        lam: the damping whose map is measured beside f itself, lam J + (1 - lam) I.
        exact_solver: solves the adjoint of the exact gradient that the run's own is compared to; None leaves it out.
            `Anderson` with a memory of all its steps is GMRES there, which converges where f expands, too.
        compare: further estimators to compare with the exact gradient, by name.

    `measure` returns the mean of each radius over the problems, and as `_above_one` the share of those whose radius is.
    Of the exact gradient it returns `exact_residual`, the 90th percentile over the problems of the residual of the
    adjoint equation, and `exact_unsolved`, the share above `UNSOLVED`. `pretraining` is 1 where the run's own gradient
    is the unrolled one of a pretraining.
    """

    every: int
    radius_steps: int = 20
    lam: float = 0.5
    exact_solver: Solver | None = None
    compare: dict[str, GradientEstimator] | None = None

    def __post_init__(self) -> None:
        check_count("every", self.every, least=1)
        check_count("radius_steps", self.radius_steps, least=0)

    def measure(self, model: nn.Module, task: Task, batch: Any, carry: Any) -> dict[str, float]:
        """Return the measurements; random state, weights, batch statistics, gradients and carry stay as they were."""
        with _Batch(model, task, batch, carry) as measured:
            return self._radii(measured) | self._cosines(measured)

    def _radii(self, measured: _Batch) -> dict[str, float]:
        if self.radius_steps == 0:
            return {}
        with torch.no_grad():
            calls = measured.solves()
        values = [ritz_values(f, out.z_star, num_steps=self.radius_steps) for f, out in calls]
        measured.rewind()  # not before: f may read a weight that the model has projected
        result = {}
        for name, lam in (("spectral_radius", 1.0), ("damped_spectral_radius", self.lam)):
            radii = torch.cat([damped_radius(mu, lam) for mu in values])
            result[name], result[f"{name}_above_one"] = float(radii.mean()), float((radii > 1).double().mean())
        return result

    def _cosines(self, measured: _Batch) -> dict[str, float]:
        if self.exact_solver is None:
            return {}
        parameters = measured.parameters_before_the_equilibrium()
        estimator = measured.deqs[0].grad
        reference, solutions = measured.gradient(Implicit(solver=self.exact_solver), parameters)
        adjoints = [solution.stats.adjoint for _, solution in solutions if solution.stats.adjoint is not None]
        residual = torch.cat([adjoint.residual.double() for adjoint in adjoints])
        result = {
            "pretraining": float(not estimator.needs_equilibrium),
            "exact_residual": float(residual.quantile(0.9)),
            "exact_unsolved": float((residual > UNSOLVED).double().mean()),
        }
        for name, compared in {"": estimator, **(self.compare or {})}.items():
            estimate, _ = measured.gradient(compared, parameters)
            suffix = f"/{name}" if name else ""
            result[f"gradient_cosine{suffix}"] = float(cosine(estimate, reference))
            result[f"gradient_norm_ratio{suffix}"] = float(norm_ratio(estimate, reference))
        return result


class _Batch:
    """One batch of a model, scored several times from the same random state and buffers; they are restored at exit.

    So are weights: a model may project its own where it uses them.
    """

    def __init__(self, model: nn.Module, task: Task, batch: Any, carry: Any) -> None:
        self.model, self.task, self.batch, self.carry = model, task, batch, carry
        self.deqs = deqs_of(model)
        self._kept = [(deq.grad, deq.regularizer, deq.clock) for deq in self.deqs]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._state = torch.get_rng_state()
        self._cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def __enter__(self) -> _Batch:
        for deq in self.deqs:
            deq.regularizer, deq.clock = None, nullcontext
        return self

    def __exit__(self, *_: object) -> None:
        self.rewind()
        for deq, (grad, regularizer, clock) in zip(self.deqs, self._kept, strict=True):
            deq.grad, deq.regularizer, deq.clock = grad, regularizer, clock

    def solves(self) -> list[Call]:
        """Return (f, solution) of every solve. Rewind after the last use of their graphs."""
        return capture(self.model, self.task, self.batch, self.carry)

    def parameters_before_the_equilibrium(self) -> list[nn.Parameter]:
        """Return the parameters that f depends on: the head's gradient is exact under every estimator."""
        outputs = [f(out.z_star) for f, out in self.solves()]
        parts = [part.sum() for z in outputs for part in pytree.tree_leaves(z)]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        reached = torch.autograd.grad(parts, parameters, allow_unused=True)
        self.rewind()
        return [p for p, gradient in zip(parameters, reached, strict=True) if gradient is not None]

    def gradient(
        self, estimator: GradientEstimator, parameters: Sequence[nn.Parameter]
    ) -> tuple[list[Tensor], list[Call]]:
        """Return the gradient of the batch's loss by `estimator`, and the solves it went through."""
        for deq in self.deqs:
            deq.grad = estimator
        with solves_of(self.model) as calls:
            loss = self.task.score(self.model, self.batch, self.carry).tally.loss_sum
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.rewind()
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)], calls

    def rewind(self) -> None:
        """Restore the random state, the weights and the buffers of the beginning."""
        torch.set_rng_state(self._state)
        if self._cuda_state is not None:
            torch.cuda.set_rng_state(self._cuda_state)
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.copy_(value)


def capture(model: nn.Module, task: Task, batch: Any, carry: Any) -> list[Call]:
    """Score the batch and return (f, solution) of every solve on the way."""
    with solves_of(model) as calls:
        task.score(model, batch, carry)
    return calls


@contextmanager
def solves_of(model: nn.Module) -> Iterator[list[Call]]:
    """Collect (f, solution) of every solve of the body."""
    calls: list[Call] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], solution: Solution) -> None:
        calls.append((arguments[0], solution))

    hooks = [deq.register_forward_hook(keep) for deq in deqs_of(model)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
