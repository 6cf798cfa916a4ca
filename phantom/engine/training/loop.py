"""The training loop: one page, for every task, model and estimator.

One optimiser step takes this rank's micro-batches of one global batch; loss and gradients are sums divided once by the
global count, so accumulation, ranks and short last batches need no special case. The only device-to-host
synchronisations are at log rows, evaluations and checkpoints, marked below.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from phantom.deq import deqs_of
from phantom.engine.artifacts import checkpoint as checkpoints
from phantom.engine.artifacts.progress import Progress
from phantom.engine.artifacts.records import MetricsLog, peak_memory
from phantom.engine.artifacts.tracking import Tracker
from phantom.engine.errors import CheckpointError, DivergenceError
from phantom.engine.machine import distributed
from phantom.engine.machine.precision import autocast
from phantom.engine.measure.monitor import Monitor
from phantom.engine.measure.solves import SolveMeter
from phantom.engine.measure.timing import StepTimer
from phantom.engine.source import Shard, Source
from phantom.engine.tasks.base import Score, Tally, Task
from phantom.engine.training.clipping import Clipping, gradient_norm, scale_gradients
from phantom.engine.training.cuda_graph import StepGraphs
from phantom.engine.training.evaluation import batch_to, evaluate
from phantom.engine.training.rules import Rules
from phantom.engine.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train, and how often to look.

    Args:
        epochs: passes over the training data.
        steps: stop after so many optimiser steps, if earlier.
        eval_every: evaluate every so many steps; None evaluates at the end of each epoch.
        log_every: write a training row every so many steps.
        checkpoint_every: save every so many steps, besides at each evaluation.
        eval_splits: splits to evaluate; the headline metric of the first one selects the best checkpoint, and `best`
            in the record is what that checkpoint gives on all of them.
    """

    epochs: int
    steps: int | None
    eval_every: int | None
    log_every: int
    checkpoint_every: int | None
    eval_splits: tuple[str, ...]


@dataclass(kw_only=True)
class Trainer:
    """Train a model; `fit` runs to the end, from wherever the last checkpoint in `folder` stands.

    Args:
        model: as the task calls it (wrapped for several processes); `bare` is the same without the wrapper.
        ema_decay: decay of an exponential moving average of the weights, which is then what is evaluated.
        progress: show a bar and a line per evaluation.
        cuda_graph: replay forward and backward as CUDA graphs; see `StepGraphs` for what that asks of the run.
        config: the resolved configuration as text, stored in every checkpoint.

    `seconds` is the wall clock of `fit` with its evaluations, over all processes that took turns at the run; what a
    killed one did after its last checkpoint is done again, and not counted.
    """

    model: nn.Module
    bare: nn.Module
    task: Task
    source: Source
    optimizer: Optimizer
    schedule: Schedule
    rules: Rules
    budget: Budget
    clipping: Clipping | None
    monitor: Monitor | None
    ema_decay: float | None
    shard: Shard
    device: torch.device
    precision: str
    cuda_graph: bool
    progress: bool
    folder: Path
    config: str
    make_tracker: Callable[[], Tracker]

    step: int = 0
    seconds: float = 0.0
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    final: dict[str, dict[str, float]] = field(default_factory=dict)
    train_report: dict[str, float] = field(default_factory=dict)

    def fit(self, *, resume: bool) -> None:
        """Train to the end of the budget.

        Raises:
            DivergenceError: the loss or the gradient stopped being finite; the last good checkpoint is kept.
            CheckpointError: the checkpoint to resume from is damaged or of another model.
        """
        self._deqs = deqs_of(self.bare)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._parameters = [p for p in self.bare.parameters() if p.requires_grad]
        self._ema = None
        if self.ema_decay is not None:
            from timm.utils import ModelEmaV3  # slow to import; torch's AveragedModel asks the device at every step

            self._ema = ModelEmaV3(self.bare, decay=self.ema_decay)
        self._lengths = [self.source.steps(epoch) for epoch in range(self.budget.epochs)]
        self.total = min(sum(self._lengths), self.budget.steps or math.inf)
        self._carries: list[Any] = [None] * self.shard.micro
        if resume and (self.folder / "last.pt").exists():
            self._load(self.folder / "last.pt")
        self._since = time.monotonic() - self.seconds
        main = self.shard.rank == 0
        self.timer = StepTimer(self.device)
        for deq in self._deqs:
            deq.clock = self.timer.phase
        self._graphs = None
        if self.cuda_graph:
            self._graphs = StepGraphs(
                lambda batch: self._forward_backward(batch, None, 0.0),
                deqs=self._deqs,
                parameters=self._parameters,
                timer=self.timer,
            )
        self._log = MetricsLog(self.folder / "metrics.jsonl", keep_until=self.step) if main else None
        self._tracker = self.make_tracker() if main else None
        self._progress = Progress(self.total, done=self.step, enabled=main and self.progress)
        self._first_bad = torch.full((), -1, device=self.device)
        self._reset_window()
        try:
            self._epochs()
        except BaseException:
            if self._tracker is not None:
                self._tracker.abort()
            raise
        finally:
            self._progress.stop()
            if self._log is not None:
                self._log.close()

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close the tracker with the final record."""
        if self._tracker is not None:
            self._tracker.finish(
                {key: value for key, value in record.items() if isinstance(value, (int, float, str, dict))}
            )

    # ---------------------------------------------------------------------------------------------------- the loop

    def _epochs(self) -> None:
        self.model.train()
        before = 0
        for epoch, length in enumerate(self._lengths):
            start, before = self.step - before, before + length
            if start >= length or self.step >= self.total:
                continue
            if start == 0:
                self._carries = [None] * self.shard.micro
            for micro_batches in self.source.train(epoch=epoch, start=start, shard=self.shard):
                self._train_step(micro_batches, epoch)
                self.step += 1
                self._after_step(micro_batches, epoch, end_of_epoch=self.step == before)
                if self.step >= self.total:
                    return

    def _train_step(self, micro_batches: list[Any], epoch: int) -> None:
        penalty_weight = self.rules.apply(self._deqs, self.step, self.total)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = self.schedule.rate(self.step, base=base, total=self.total, epoch=epoch)
        if not micro_batches:
            return  # too few examples for every rank to have one
        total: Tally | None = None
        with self.timer.phase("step"):
            for i, batch in enumerate(micro_batches):
                last = i + 1 == len(micro_batches)
                with contextlib.nullcontext() if last or self.shard.world == 1 else self.model.no_sync():
                    score = self._score(batch_to(batch, self.device), i, penalty_weight)
                self._meter.add(score.solutions)
                total = score.tally if total is None else total + score.tally
            with self.timer.phase("optimizer"):
                self._update(total)
        self.timer.end_step(total.count * self.shard.world)
        self._window = total if self._window is None else self._window + total

    def _score(self, batch: Any, micro: int, penalty_weight: float) -> Score:
        """Run one micro-batch forward and backward."""
        if self._graphs is not None:
            return self._graphs(batch)
        score = self._forward_backward(batch, self._carries[micro], penalty_weight)
        self._carries[micro] = score.carry
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

    def _update(self, tally: Tally) -> None:
        """Divide the summed gradients by the global count, check, clip and step."""
        loss = tally.loss_sum
        if self.shard.world > 1:
            sums = torch.stack((loss, loss.new_full((), tally.count)))
            dist.all_reduce(sums)
            loss, count = sums
            scale_gradients(self._parameters, self.shard.world / count)  # DDP has averaged over ranks already
        else:
            scale_gradients(self._parameters, 1 / tally.count)
        norm = gradient_norm(self._parameters)
        self._norm_sum, self._updates = self._norm_sum + norm, self._updates + 1
        bad = ~(norm.isfinite() & loss.isfinite()) & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, self.step + 1)  # counted as in the rows
        if self.clipping is not None:
            self.clipping.clip(self._parameters, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._ema is not None:
            self._ema.update(self.bare, step=self.step + 1)  # the first one copies

    def _after_step(self, micro_batches: list[Any], epoch: int, *, end_of_epoch: bool) -> None:
        budget, done = self.budget, self.step == self.total
        self._progress.step(self.step, epoch)
        every = budget.eval_every
        evaluates = done or (end_of_epoch if every is None else self.step % every == 0)
        saves = evaluates or (budget.checkpoint_every is not None and self.step % budget.checkpoint_every == 0)
        if self.monitor is not None and self.step % self.monitor.every == 0 and micro_batches:
            self._check_finite(epoch)
            batch = batch_to(micro_batches[0], self.device)
            measured = self.monitor.measure(self.bare, self.task, batch, self._carries[0])
            self._write({"kind": "monitor", **measured}, epoch)
        if saves or self.step % budget.log_every == 0:
            self._flush(epoch)  # device-to-host sync
        if evaluates:
            self._evaluate(epoch)  # device-to-host sync
        if saves:
            self._save("last.pt")

    # ------------------------------------------------------------------------------------------- rows and evaluations

    def _reset_window(self) -> None:
        self._window: Tally | None = None
        self._meter = SolveMeter()
        self._norm_sum: Tensor | float = 0.0
        self._updates = 0

    def _check_finite(self, epoch: int) -> None:
        first_bad = int(self._first_bad)
        if first_bad >= 0:
            raise DivergenceError(
                f"the loss or its gradient stopped being finite at step {first_bad} (epoch {epoch}). The last good "
                f"checkpoint, if one was saved, is {self.folder / 'last.pt'}. Try a smaller optimizer.lr, "
                "clipping=total, a smaller lam or k, more solver.max_steps, precision=fp32, or look for a broken batch "
                "near that step"
            )

    def _flush(self, epoch: int) -> None:
        self._check_finite(epoch)
        if self._window is None:
            return
        tally = self._window.all_reduce()
        row = {"kind": "train", **self.task.report(tally), **self._meter.report()}
        row["gradient_norm"] = float(self._norm_sum) / self._updates
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        self.train_report = dict(row)
        times, speed = self.timer.recent()
        row |= {f"time/{name}": seconds for name, seconds in times.items()}
        row |= ({"items_per_second": speed} if speed else {}) | {"peak_memory": peak_memory(self.device)}
        self._write(row, epoch)
        self._progress.train_row(row)
        self._reset_window()

    def _evaluate(self, epoch: int) -> None:
        model = self.evaluated_model
        distributed.share_buffers(model)
        self.rules.restore(self._deqs)
        for split in self.budget.eval_splits:
            metrics = evaluate(
                model, self.task, self.source, split, shard=self.shard, device=self.device, precision=self.precision
            )
            self._write({"kind": "eval", "split": split, **metrics}, epoch)
            self._progress.eval_row({"split": split, "epoch": epoch, "step": self.step, **metrics})
            self.final[split] = metrics
        self._select(epoch)
        self.timer.reset_marks()

    def _select(self, epoch: int) -> None:
        """Keep weights, and metrics on all splits, of the evaluation at which the first split was best."""
        metric, first = self.task.metric, self.budget.eval_splits[0]
        sign = 1 if self.task.mode == "max" else -1
        if not self.best or sign * self.final[first][metric] > sign * self.best[first][metric]:
            self.best = {split: {**metrics, "epoch": epoch, "step": self.step} for split, metrics in self.final.items()}
            self._save("best.pt")

    def _write(self, row: dict[str, Any], epoch: int) -> None:
        if self._log is not None:
            row = {"kind": row.pop("kind"), "step": self.step, "epoch": epoch, **row}
            self._log.write(row)
            self._tracker.log(row)

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that evaluation sees: the moving average when there is one."""
        return self.bare if self._ema is None else self._ema.module

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, name: str) -> None:
        """Write a checkpoint; every rank must call this."""
        # the weights are the same on all ranks, random state and carries are not
        own = {"rng": checkpoints.rng_state(self.device), "carries": batch_to(self._carries, torch.device("cpu"))}
        ranks = distributed.gather(own)
        self.seconds = time.monotonic() - self._since
        if self.shard.rank > 0:
            return
        state = {
            "model": self.bare.state_dict(),
            "ema": None if self._ema is None else self._ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "final": self.final,
            "train_report": self.train_report,
            "ranks": ranks,
            "config": self.config,
        }
        checkpoints.save(self.folder / name, state)

    def _load(self, path: Path) -> None:
        state = checkpoints.load(path)
        checkpoints.check_config(state, self.config, path)
        world = len(state["ranks"])
        if world != self.shard.world:
            raise CheckpointError(
                f"the checkpoint {path} was written by {world} process(es), this run has {self.shard.world}: resume "
                f"with {world}, or start anew with resume=never"
            )
        checkpoints.load_weights(self.bare, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self._ema is not None:
            checkpoints.load_weights(self._ema.module, state["ema"], path)
        for name in ("step", "best", "final", "train_report"):
            setattr(self, name, state[name])
        self.seconds = state.get("seconds", 0.0)  # which early checkpoints do not know
        own = state["ranks"][self.shard.rank]
        self._carries = batch_to(own["carries"], self.device)
        checkpoints.set_rng_state(own["rng"], self.device)
