"""What depends on the step of training: the pretraining phase, the penalty, the jitter of the solver's budget.

Each rule is a pure function of (step, total, seed); the loop evaluates them before every step, and nothing else does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from phantom import BPTT, DEQ, GradientEstimator, Solver
from phantom.deq import Regularizer
from phantom.engine.training.course import Course
from phantom.engine.training.schedule import share_of_run
from phantom.validate import ANY, check_count, check_number


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Train the first steps as an unrolled network: `layers` applications of f from z0, no solver.

    Args:
        steps: length of the phase in a full run.
        layers: applications of f.
        of_steps: length of that full run; a shorter run keeps the share. None takes `steps` as it is.
    """

    steps: int
    layers: int
    of_steps: int | None = None

    def __post_init__(self) -> None:
        check_count("pretraining.steps", self.steps, least=1)
        check_count("pretraining.layers", self.layers, least=1)
        check_count("pretraining.of_steps", self.of_steps, least=1, optional=True)

    def active(self, step: int, total: int) -> bool:
        return step < share_of_run(self.steps, self.of_steps, total)


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """Weigh a regulariser over training: on a random share of the steps, with a weight that grows in stages.

    weight(step) = weight + increment * floor(step / increment_every) (the official language scripts add 0.1 at every
    multiple of `increment_every`); zero during pretraining and from `stop_step` on.

    Args:
        regularizer: the differentiable penalty, such as `phantom.JacobianRegularizer`.
        weight: of the penalty of every solve in the mean loss.
        frequency: probability that a step is regularised.
        increment_every, stop_step: in steps of a full run.
        of_steps: length of that full run; a shorter run keeps the shares. None takes both as they are.
    """

    regularizer: Regularizer
    weight: float
    frequency: float = 1.0
    increment: float = 0.0
    increment_every: int | None = None
    stop_step: int | None = None
    of_steps: int | None = None

    def __post_init__(self) -> None:
        check_number("weight", self.weight, ">= 0")
        check_number("increment", self.increment, ANY)
        check_count("increment_every", self.increment_every, least=1, optional=True)
        check_count("stop_step", self.stop_step, least=0, optional=True)
        check_count("penalty.of_steps", self.of_steps, least=1, optional=True)
        check_number("frequency", self.frequency, "(0, 1]", also=": the share of regularised steps")

    def at(self, step: int, seed: int, total: int | None = None) -> float:
        """Return the weight of `step` in a run of `total` steps; None is a full run."""
        full = step if total is None or self.of_steps is None else step * self.of_steps // total
        if self.stop_step is not None and full >= self.stop_step:
            return 0.0
        if _draw("penalty", seed, step).random() >= self.frequency:
            return 0.0
        stages = 0 if self.increment_every is None else full // self.increment_every
        return self.weight + self.increment * stages


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Add a uniform integer in {-below, ..., 0} to the solver's `max_steps` at every training step."""

    below: int

    def __post_init__(self) -> None:
        check_count("jitter.below", self.below, least=1)

    def at(self, step: int, seed: int) -> int:
        return -_draw("jitter", seed, step).randint(0, self.below)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """All rules of a run, and the settings they start from."""

    solver: Solver
    grad: GradientEstimator
    seed: int
    pretraining: Pretraining | None = None
    penalty: Penalty | None = None
    jitter: Jitter | None = None
    course: Course | None = None

    def __post_init__(self) -> None:
        if self.course is not None:
            self.course.check(self.grad)

    def govern(self, deq: DEQ) -> bool:
        """Return whether `deq` has the settings of the config; one of a model's own keeps those that it was given."""
        return deq.solver == self.solver and deq.grad == self.grad

    def apply(self, deqs: list[DEQ], step: int, total: int) -> float:
        """Set these DEQs for `step` and return the weight of the penalty."""
        solver, grad, weight = self.solver, self.grad, 0.0
        if self.pretraining is not None and self.pretraining.active(step, total):
            grad = BPTT(num_steps=self.pretraining.layers)
        else:
            if self.course is not None:
                solver, grad = self.course.at(solver, grad, step=step, total=total, seed=self.seed)
            if self.jitter is not None:
                solver = replace(solver, max_steps=max(1, solver.max_steps + self.jitter.at(step, self.seed)))
            if self.penalty is not None:
                weight = self.penalty.at(step, self.seed, total)
        for deq in deqs:
            deq.solver, deq.grad = solver, grad
            deq.regularizer = self.penalty.regularizer if self.penalty is not None and weight > 0 else None
        return weight

    def restore(self, deqs: list[DEQ]) -> None:
        """Give these DEQs what an evaluation has: the solver of the config, without jitter, and no penalty."""
        for deq in deqs:
            deq.solver, deq.regularizer = self.solver, None


def _draw(name: str, seed: int, step: int) -> random.Random:
    return random.Random(f"{name}/{seed}/{step}")
