"""What a task is to the loop: it scores a batch and reports a tally. The loop never asks which kind it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from phantom import Solution
from phantom.engine.errors import ConfigError


@dataclass
class Tally:
    """Sums that add over micro-batches, batches and ranks, and are divided once, at the end.

    Args:
        loss_sum: () sum of the loss over what `count` counts; carries the graph during training.
        count: number of scored items (images, tokens, graphs, node-label pairs).
        sums: further sums by name, such as the number of correct predictions, of any shape: one a class, for one.
    """

    loss_sum: Tensor
    count: int
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        if self.sums.keys() != other.sums.keys():
            raise ValueError(f"tallies of different tasks cannot add: {sorted(self.sums)} and {sorted(other.sums)}")
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return Tally(self.loss_sum + other.loss_sum, self.count + other.count, sums)

    def detach(self) -> Tally:
        """Return the same numbers in float64, without a graph."""
        return Tally(
            self.loss_sum.detach().double(),
            self.count,
            {name: value.detach().double() for name, value in self.sums.items()},
        )

    def all_reduce(self) -> Tally:
        """Return the tally summed over all ranks (itself in a single process)."""
        if not dist.is_initialized():
            return self
        names = sorted(self.sums)
        values = [self.loss_sum.new_tensor(float(self.count)), self.loss_sum, *(self.sums[name] for name in names)]
        packed = torch.cat([value.flatten() for value in values])
        dist.all_reduce(packed)
        parts = packed.split([value.numel() for value in values])
        count, loss_sum, *sums = (part.view(value.shape) for part, value in zip(parts, values, strict=True))
        return Tally(loss_sum, round(count.item()), dict(zip(names, sums, strict=True)))


class Score(NamedTuple):
    """What scoring one batch gives: the tally, one Solution per solve, and the state to carry to the next batch."""

    tally: Tally
    solutions: tuple[Solution, ...]
    carry: Any

    def detach(self) -> Score:
        """Return the score without the graph of its step, which the states would keep alive."""
        solutions = tuple(
            replace(s, value=s.z_star, penalty=None if s.penalty is None else s.penalty.detach())
            for s in self.solutions
        )
        return Score(self.tally.detach(), solutions, self.carry)


class Task(ABC):
    """One kind of training: how a batch is scored and how a tally becomes metrics.

    kind: its name; a data set is of one kind, a model lists the kinds that it serves.
    unit: the plural of what `Tally.count` counts, as in "images" per second.
    metric, mode: the headline number of a report, and whether more or less of it is better.
    carry_rows: the tensors of a carry have the rows of the batch in dimension 0, so that another number of processes
        can go on with them.
    fixed_shapes: all batches but the last of an epoch have the same shapes, and no batch carries anything to the next.
    """

    kind: ClassVar[str]
    unit: ClassVar[str] = "items"
    metric: ClassVar[str]
    mode: ClassVar[Literal["max", "min"]]
    carry_rows: ClassVar[bool] = False
    fixed_shapes: ClassVar[bool] = False

    @abstractmethod
    def score(self, model: nn.Module, batch: Any, carry: Any) -> Score:
        """Run `model` on `batch`.

        Args:
            carry: None at the start of an epoch or of an evaluation, then the `carry` of the score before. Tensors in
                it are detached: it may be a tensor, or nested lists, tuples and dicts of tensors, which checkpoints
                keep.
        """

    @abstractmethod
    def report(self, tally: Tally) -> dict[str, float]:
        """Divide a tally (of one step, or of a whole split over all ranks) into metrics, `loss` among them."""

    def is_better(self, found: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Return whether the headline metric of `found` beats that of `best`; any number beats one that is none."""
        new, old = found[self.metric], best[self.metric]
        if math.isnan(old):
            return not math.isnan(new)
        return new > old if self.mode == "max" else new < old

    def metrics(self, tally: Tally) -> dict[str, float]:
        """Return the report as plain numbers.

        Raises:
            ConfigError: it lacks the headline metric, or an entry is no number.
        """
        report, name = self.report(tally), type(self).__name__
        if self.metric not in report:
            raise ConfigError(f"{name}.report must give {self.metric!r}, its metric; it gives {', '.join(report)}")
        found: dict[str, float] = {}
        for key, value in report.items():
            try:
                found[key] = value if type(value) in (bool, int, float) else float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"{name}.report must give numbers, got {key}={value!r}") from error
        return found


def outputs_of(model: nn.Module, *inputs: Any) -> Sequence[Any]:
    """Return what `model(*inputs)` returns, (output, solutions) and what its kind of task takes besides.

    Raises:
        ConfigError: it returns something else.
    """
    found = model(*inputs)
    solutions = found[1] if isinstance(found, (tuple, list)) and len(found) > 1 else None
    if not isinstance(solutions, (tuple, list)) or not all(isinstance(solution, Solution) for solution in solutions):
        name = type(getattr(model, "module", model)).__name__  # of a model that DistributedDataParallel holds
        parts = ", ".join(type(part).__name__ for part in found) if isinstance(found, (tuple, list)) else None
        raise ConfigError(
            f"model: {name}.forward must return (output, solutions), where solutions is a tuple of the Solution of "
            f"every solve: return logits, (solution,). It returns {parts or type(found).__name__}"
        )
    return found


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits of a narrower format as float32: a loss summed in bfloat16 loses its digits."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def classification_tally(logits: Tensor, labels: Tensor) -> Tally:
    """Return the summed cross entropy of `logits` (N, C) for `labels` (N,), with the number of correct predictions."""
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction="sum")
    return Tally(loss, labels.numel(), {"correct": (logits.argmax(dim=1) == labels).sum()})


def classification_report(tally: Tally) -> dict[str, float]:
    """Return the mean loss and the accuracy in percent of a `classification_tally`."""
    return {
        "loss": float(tally.loss_sum) / tally.count,
        "accuracy": 100 * float(tally.sums["correct"]) / tally.count,
    }
