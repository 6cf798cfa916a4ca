"""One optimiser step: forward, backward, the global division, norm, finite check, clipping, update, average.

Loss and gradients are sums that are divided once by the global count, so accumulation, ranks and short last batches
need no special case. A step never waits for the device.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from phantom.deq import deqs_of
from phantom.engine.errors import DivergenceError
from phantom.engine.machine.precision import autocast
from phantom.engine.machine.vote import Vote
from phantom.engine.measure.solves import SolveMeter
from phantom.engine.measure.timing import StepTimer
from phantom.engine.source import Shard
from phantom.engine.tasks import Task
from phantom.engine.tasks.base import Score, Tally
from phantom.engine.training.clipping import Clipping, gradient_norm, scale_gradients
from phantom.engine.training.cuda_graph import StepGraphs
from phantom.engine.training.evaluation import batch_to


class Window:
    """Sums over the steps since the last log row; they stay on the device until the row is written.

    tally: of all micro-batches of this rank; None before the first step.
    solves: statistics of all solves.
    norm_sum, updates: sum and number of the gradient norms.
    """

    def __init__(self) -> None:
        self.tally: Tally | None = None
        self.solves = SolveMeter()
        self.norm_sum: Tensor | float = 0.0
        self.updates = 0

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint in the middle of a window keeps of it; None for an empty window."""
        if self.tally is None:
            return None
        tally = {"loss_sum": self.tally.loss_sum, "count": self.tally.count, "sums": self.tally.sums}
        return {"tally": tally, "solves": self.solves.state(), "norm_sum": self.norm_sum, "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        """Continue the window that `state` is of."""
        self.tally = Tally(**state["tally"])
        self.solves.load(state["solves"])
        self.norm_sum, self.updates = state["norm_sum"], state["updates"]


class Step:
    """Take optimiser steps.

    Args:
        model: as the task calls it: wrapped for several processes.
        unwrapped: the same model without the wrapper.
        ema_decay: decay of an exponential moving average of the weights; None keeps none.
        cuda_graph: replay forward and backward as CUDA graphs; see `StepGraphs` for what that asks of the run.
        timer: times the phases `step`, `backward` and `optimizer`; a DEQ adds its own where its clock is the timer's.

    carries: what the task carries from one batch to the next, per micro-batch.
    vote: whether a rank wants to stop, which all ranks learn with the sums of a step.
    first_bad: () number of the first step whose loss or gradient was not finite, -1 before one is; on the device.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        unwrapped: nn.Module,
        task: Task,
        optimizer: Optimizer,
        clipping: Clipping | None,
        ema_decay: float | None,
        shard: Shard,
        device: torch.device,
        precision: str,
        cuda_graph: bool,
        timer: StepTimer,
    ) -> None:
        self.model, self.unwrapped, self.task, self.optimizer = model, unwrapped, task, optimizer
        self.clipping, self.shard, self.device, self.precision, self.timer = clipping, shard, device, precision, timer
        self.window = Window()
        self.vote = Vote(device)
        self.first_bad = torch.full((), -1, device=device)
        self.carries: list[Any] = []
        self.reset_carries()
        self.average: Any = None
        if ema_decay is not None:
            # slow to import; torch's AveragedModel asks the device at every step
            from timm.utils.model_ema import ModelEmaV3

            self.average = ModelEmaV3(unwrapped, decay=ema_decay)
        self._parameters = [p for p in unwrapped.parameters() if p.requires_grad]
        self._graphs: StepGraphs | None = None
        if cuda_graph:
            self._graphs = StepGraphs(
                lambda batch: self._forward_backward(batch, None, 0.0),
                deqs=deqs_of(unwrapped),
                parameters=self._parameters,
                timer=timer,
            )

    def __call__(self, micro_batches: Sequence[Any], *, number: int, penalty_weight: float = 0.0) -> Score:
        """Train on this rank's micro-batches of one global batch; return the score of the last one.

        Args:
            number: of the step in the run, from 1.
            penalty_weight: of the regulariser's value of every solve, in the mean loss.
        """
        tallies: list[Tally] = []
        with self.timer.phase("step"):
            for i, batch in enumerate(micro_batches):
                model, last = self.model, i + 1 == len(micro_batches)
                with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
                    score = self._score(batch_to(batch, self.device), i, penalty_weight)
                self.window.solves.add(score.solutions)
                tallies.append(score.tally)
            total = functools.reduce(operator.add, tallies)
            with self.timer.phase("optimizer"):
                count = self._update(total, number)
        self.timer.end_step(count)
        self.window.tally = total if self.window.tally is None else self.window.tally + total
        return score

    def check_finite(self, epoch: int, folder: Path) -> None:
        """Look whether every step so far was finite: a device-to-host synchronisation.

        Args:
            epoch, folder: where the run stands and where its checkpoints lie, for the message.

        Raises:
            DivergenceError: names the first step that was not.
        """
        first_bad = int(self.first_bad)
        if first_bad >= 0:
            raise DivergenceError(
                f"the loss or its gradient stopped being finite at step {first_bad} (epoch {epoch}). The last good "
                f"checkpoint, if one was saved, is {folder / 'last.pt'}. Try a smaller optimizer.lr, "
                "clipping=total, a smaller lam or k, more solver.max_steps, precision=fp32, or look for a broken batch "
                "near that step"
            )

    def reset_carries(self) -> None:
        """Forget what was carried, as at the start of an epoch."""
        self.carries = [None] * self.shard.micro

    def reset_window(self) -> None:
        """Begin new sums, as after a log row."""
        self.window = Window()

    def _score(self, batch: Any, micro: int, penalty_weight: float) -> Score:
        if self._graphs is not None:
            return self._graphs(batch)
        score = self._forward_backward(batch, self.carries[micro], penalty_weight)
        self.carries[micro] = score.carry
        return score

    def _forward_backward(self, batch: Any, carry: Any, penalty_weight: float) -> Score:
        """Add the gradients of a micro-batch; return its score without a graph."""
        with autocast(self.precision, self.device):
            score = self.task.score(self.model, batch, carry)
        loss = score.tally.loss_sum
        for solution in score.solutions:
            if solution.penalty is not None:
                loss = loss + penalty_weight * score.tally.count * solution.penalty
        with self.timer.phase("backward"):
            loss.backward()
        return score.detach()

    def _update(self, tally: Tally, number: int) -> int | Tensor:
        """Divide the summed gradients by the global count, check, clip and step; return that count."""
        loss: Tensor = tally.loss_sum
        count: int | Tensor = tally.count
        if self.shard.world > 1:
            sums = torch.stack((loss, loss.new_full((), tally.count), loss.new_full((), self.vote.own)))
            dist.all_reduce(sums)
            loss, count, votes = sums
            self.vote.count(votes)
            scale_gradients(self._parameters, self.shard.world / count)  # DDP has averaged over ranks already
        else:
            scale_gradients(self._parameters, 1 / count)
        norm = gradient_norm(self._parameters)
        self.window.norm_sum, self.window.updates = self.window.norm_sum + norm, self.window.updates + 1
        bad = ~(norm.isfinite() & loss.isfinite()) & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, number)
        if self.clipping is not None:
            self.clipping.clip(self._parameters, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.unwrapped, step=number)  # the first one copies
        return count
