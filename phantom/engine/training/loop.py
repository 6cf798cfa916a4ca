"""The training loop, for every task, model and estimator.

The loop says when: which batch, settings and rate a step has, when to write a row, evaluate and save. The only
device-to-host synchronisations are at log rows, evaluations and checkpoints, marked below.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from phantom.deq import deqs_of
from phantom.engine.artifacts import checkpoint as checkpoints
from phantom.engine.artifacts import files
from phantom.engine.artifacts.identity import Data, check_same_data
from phantom.engine.artifacts.journal import Journal
from phantom.engine.artifacts.provenance import device_name
from phantom.engine.artifacts.tracking import Tracker
from phantom.engine.machine import distributed
from phantom.engine.machine.lateness import LateRanks
from phantom.engine.machine.memory import peak_memory
from phantom.engine.machine.signals import Interrupted, Interruption, name_of
from phantom.engine.measure.monitor import Monitor
from phantom.engine.measure.timing import StepTimer
from phantom.engine.source import Shard, Source, dead_worker, training_steps
from phantom.engine.speed import Speed
from phantom.engine.tasks import Task
from phantom.engine.training.budget import Budget
from phantom.engine.training.clipping import Clipping
from phantom.engine.training.evaluation import StoppedError, batch_to, evaluate
from phantom.engine.training.redistribution import carries_to_resume, newest_of_all
from phantom.engine.training.rules import Rules
from phantom.engine.training.schedule import Schedule
from phantom.engine.training.step import Step
from phantom.engine.training.stopwatch import Stopwatch

NEW_RANK = 7919  # a prime, so that the seeds of new ranks at different steps are different
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """Train a model; `fit` runs to the end, from wherever the last checkpoint in `folder` stands.

    Args:
        model: as the task calls it, wrapped for several processes; `unwrapped` is the same without the wrapper.
        ema_decay: decay of an exponential moving average of the weights; the loop then evaluates the average.
        progress: show a bar and a line per evaluation.
        speed: what is compiled and captured; CUDA graphs ask what `StepGraphs` says of the run.
        config: the resolved configuration as text, stored in every checkpoint.
        origin: what the run began with, for the record; a checkpoint that is resumed has its own.
        make_tracker: opens the tracker; True begins a curve of its own.
        differences: returns the root keys in which a checkpoint's config, as text, is another run's.

    Attributes:
        data: which data it trains on.
        step: optimiser steps taken; `total`: those of the whole budget.
        stopwatch: wall clock of `fit`, summed over restarts, and of its training without evaluations and their
            checkpoints; work lost after the last checkpoint is not counted.
        best, final: metrics per split at the best evaluation so far and at the last one; train_report: the last row.
    """

    model: nn.Module
    unwrapped: nn.Module
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
    speed: Speed
    progress: bool
    folder: Path
    config: str
    differences: Callable[[str], list[str]]
    make_tracker: Callable[[bool], Tracker]
    origin: dict[str, Any] | None = None

    step: int = 0
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    final: dict[str, dict[str, float]] = field(default_factory=dict)
    train_report: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.timer = StepTimer(self.device)
        self.stopwatch = Stopwatch()
        self.data = Data(self.source.digests(), self.config)
        self.total = self.budget.total(self.source)
        self._deqs = [deq for deq in deqs_of(self.unwrapped) if self.rules.govern(deq)]
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._take_step = Step(
            model=self.model,
            unwrapped=self.unwrapped,
            task=self.task,
            optimizer=self.optimizer,
            clipping=self.clipping,
            ema_decay=self.ema_decay,
            shard=self.shard,
            device=self.device,
            precision=self.precision,
            cuda_graph=self.speed.cuda_graph,
            timer=self.timer,
        )
        for deq in self._deqs:  # now that the average has its copy, which evaluates unheard
            deq.clock = self.timer.phase
        self._goes_on = self._checked = False  # from a checkpoint of its own; that it can be saved
        self._measured_before: dict[str, Any] | None = None
        self._interruption = Interruption()
        self._late_ranks = LateRanks()
        # the epoch of a step whose evaluation a signal cut short
        self._evaluation_due: int | None = None
        # opened by fit, which knows where the run stands
        self._opened: Journal | None = None

    def fit(self, *, resume: bool) -> None:
        """Train to the end of the budget, or to its target. A second call finds that done, and does nothing.

        A signal of `signals.STOPPING` ends it after the step, or in the evaluation, that it reaches on any rank, with a
        checkpoint that continues to the same numbers.

        Raises:
            DivergenceError: the loss or the gradient stopped being finite; the last good checkpoint is kept.
            CheckpointError: no checkpoint to resume from is intact, or it is of another model or other data.
            DataError: a process that loads data has died.
            LockedError: the folder was moved or removed, or another run writes there.
            Interrupted: a signal asked for the end; a SystemExit with status 128 + its number.
        """
        if self._opened is not None and self._ended:
            return
        if resume:
            self._resume()
        self.stopwatch.start()
        main = self.shard.rank == 0
        if main:  # once nothing was refused: until then the folder is that of the run before
            files.write(self.folder / "config.yaml", self.config.encode())
        self._opened = Journal(
            self.folder,
            step=self.step,
            total=self.total,
            main=main,
            shown=self.progress,
            metric=self.task.metric,
            open_tracker=lambda: self.make_tracker(not self._goes_on),
        )
        self._late_ranks.start(self.shard.rank, self.shard.world)
        try:
            with self._interruption:
                self._epochs()
        except BaseException as error:
            self._journal.abort()
            if (dead := dead_worker(error, self.step + 1, checkpoints.command_to_go_on(self.config))) is not None:
                raise dead from error
            raise
        finally:
            self._late_ranks.stop()
            self._journal.close()

    @property
    def measured(self) -> dict[str, Any]:
        """Times, throughput, peak memory and device for the record.

        They are those of this process, or, where it ended before a step was timed, of the one that it went on from.
        """
        times, before = self.timer.summary(), self._measured_before
        if before is not None and before["times"] and not times:
            return before
        speed, peak = self.timer.throughput(), peak_memory(self.device)
        return {"times": times, "items_per_second": speed, "peak_memory": peak, "device": device_name(self.device)}

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close the tracker with the final record.

        Raises:
            RuntimeError: `fit`, which opens the tracker, has not run.
        """
        self._journal.finish(record)

    # ---------------------------------------------------------------------------------------------------- the loop

    @property
    def reached(self) -> bool | None:
        """Whether an evaluation was as good as the target, the same on all ranks; None where the run has no target."""
        return self.budget.reached(self.best, self.task)

    @property
    def _ended(self) -> bool:
        return self.step >= self.total or self.reached is True

    @property
    def _journal(self) -> Journal:
        if self._opened is None:
            raise RuntimeError("fit opens what is written to: call fit first")
        return self._opened

    def _epochs(self) -> None:
        self.model.train()
        if self._evaluation_due is not None:
            self._look(self._evaluation_due, evaluates=True)
        before = 0
        for epoch in range(self.budget.epochs):
            length = self.source.steps(epoch)
            start, before = self.step - before, before + length
            if start >= length or self._ended:
                continue
            if start == 0:
                self._take_step.reset_carries()
            for micro_batches in training_steps(self.source, epoch=epoch, start=start, shard=self.shard):
                carry = self._take_step.carries[0]  # as the step finds it
                self._train_step(micro_batches, epoch)
                self.step += 1
                self._measure(micro_batches, carry, epoch)
                self._after_step(epoch, end_of_epoch=self.step == before)
                if self._ended:
                    return
                if self._signalled() if self.shard.world == 1 else self._take_step.vote.passed:
                    self._stop()

    def _train_step(self, micro_batches: list[Any], epoch: int) -> None:
        penalty_weight = self.rules.apply(self._deqs, self.step, self.total)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = self.schedule.rate(self.step, base=base, total=self.total, epoch=epoch)
        self._late_ranks.step = self.step + 1
        self._take_step.vote.own = int(self._signalled())
        if micro_batches:  # none where there are too few examples for every rank to have one
            self._take_step(micro_batches, number=self.step + 1, penalty_weight=penalty_weight)

    def _measure(self, micro_batches: list[Any], carry: Any, epoch: int) -> None:
        if self.monitor is not None and self.step % self.monitor.every == 0 and micro_batches:
            self._take_step.check_finite(epoch, self.folder)
            batch = batch_to(micro_batches[0], self.device)
            row = {"kind": "monitor", **self.monitor.measure(self.unwrapped, self.task, batch, carry)}
            self._journal.write(row, step=self.step, epoch=epoch)

    def _after_step(self, epoch: int, *, end_of_epoch: bool) -> None:
        budget, done = self.budget, self.step == self.total
        if not self._checked:  # once, before an epoch is lost for it
            own = {"optimizer": self.optimizer.state_dict(), "carries": self._take_step.carries}
            checkpoints.check(own, self.folder / checkpoints.LAST)
            self._checked = True
        self._journal.step(self.step, epoch)
        every = budget.eval_every
        evaluates = done or (end_of_epoch if every is None else self.step % every == 0)
        saves = evaluates or (budget.checkpoint_every is not None and self.step % budget.checkpoint_every == 0)
        if saves or self.step % budget.log_every == 0:
            self._flush(epoch)  # device-to-host sync
        if saves:
            self._look(epoch, evaluates=evaluates)  # device-to-host sync

    def _look(self, epoch: int, *, evaluates: bool) -> None:
        """Evaluate if asked to, and save."""
        with self.stopwatch.pause():
            if evaluates:
                self._evaluate(epoch)
            self._save(checkpoints.LAST)

    def _signalled(self) -> bool:
        return self._interruption.number > 0

    def _stop(self) -> NoReturn:
        """Save between two steps, or before an evaluation, and end; every rank must call this."""
        number = max(distributed.gather(self._interruption.number))
        self._take_step.check_finite(self._evaluation_due or 0, self.folder)
        self._save(checkpoints.LAST)
        # a rank that ended before the first one has written might take it along, as srun --kill-on-bad-exit does
        distributed.barrier()
        if self.shard.rank == 0:
            log.warning(
                "%s: stopped after step %d of %d; %s goes on from there, as if nothing had happened: %s",
                *(name_of(number), self.step, self.total),
                *(checkpoints.command_to_go_on(self.config), self.folder / checkpoints.LAST),
            )
        raise Interrupted(number)

    def _flush(self, epoch: int) -> None:
        self._take_step.check_finite(epoch, self.folder)
        window = self._take_step.window
        if window.tally is None:
            return
        row = {"kind": "train", **self.task.metrics(window.tally.all_reduce()), **window.solves.report()}
        row["gradient_norm"] = float(window.norm_sum) / window.updates
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        self.train_report = dict(row)
        times, speed = self.timer.recent()
        row |= {f"time/{name}": seconds for name, seconds in times.items()}
        row |= ({"items_per_second": speed} if speed else {}) | {"peak_memory": peak_memory(self.device)}
        self._journal.write(row, step=self.step, epoch=epoch)
        self._take_step.reset_window()

    def _evaluate(self, epoch: int) -> None:
        model = self.evaluated_model
        before = checkpoints.rng_state(self.device)
        self._evaluation_due = epoch
        distributed.share_buffers(model)
        self.rules.restore(self._deqs)
        found: dict[str, dict[str, float]] = {}
        options = {"shard": self.shard, "device": self.device, "precision": self.precision}
        try:
            for split in self.budget.eval_splits:
                found[split] = evaluate(model, self.task, self.source, split, stop=self._signalled, **options)
        except StoppedError:
            checkpoints.set_rng_state(before, self.device)
            self._stop()
        self._evaluation_due = None
        for split, metrics in found.items():
            self._journal.write({"kind": "eval", "split": split, **metrics}, step=self.step, epoch=epoch)
        self.final = found
        self._select(epoch)
        self.timer.take_marks()  # those of an evaluation are of no step

    def _select(self, epoch: int) -> None:
        """Keep weights, and metrics on all splits, of the evaluation at which the first split was best."""
        first = self.budget.eval_splits[0]
        # a continued run may have chosen by another split
        if next(iter(self.best), None) != first or self.task.is_better(self.final[first], self.best[first]):
            self.best = {split: {**metrics, "epoch": epoch, "step": self.step} for split, metrics in self.final.items()}
            self._save("best.pt")

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that evaluation sees: the moving average when there is one."""
        average = self._take_step.average
        return self.unwrapped if average is None else average.module

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, name: str) -> None:
        """Write a checkpoint; every rank must call this."""
        # the weights are the same on all ranks, random state and carries are not
        carries = batch_to(self._take_step.carries, torch.device("cpu"))
        window = batch_to(self._take_step.window.state(), torch.device("cpu"))
        ranks = distributed.gather({"rng": checkpoints.rng_state(self.device), "carries": carries, "window": window})
        seconds = self.stopwatch.state()
        if self.shard.rank > 0:
            return
        self._journal.sync()
        state = {
            "model": self.unwrapped.state_dict(),
            "ema": None if self._take_step.average is None else self._take_step.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": seconds,
            "measured": self.measured,
            "best": self.best,
            "final": self.final,
            "train_report": self.train_report,
            "ranks": ranks,
            "data_digests": dict(self.data.digests),
            "origin": self.origin,
            "evaluation_due": self._evaluation_due,
            "config": self.config,
        }
        if name == checkpoints.LAST:
            checkpoints.save_last(self.folder, state, self.budget.keep_checkpoints)
        else:
            checkpoints.save(self.folder / name, state)

    def _resume(self) -> None:
        """Go on from the newest intact checkpoint, if there is one."""
        path = newest_of_all(self.folder, self.shard.rank)
        if path is None:
            return
        state = checkpoints.load(path)
        checkpoints.check_config(state, self.differences, path)
        # early checkpoints do not know their data
        check_same_data(Data(state.get("data_digests", {}), state["config"]), self.data, path)
        checkpoints.load_weights(self.unwrapped, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self._take_step.average is not None:
            checkpoints.load_weights(self._take_step.average.module, state["ema"], path)
        for name in ("step", "best", "final", "train_report"):
            setattr(self, name, state[name])
        self.stopwatch.load(state.get("seconds", 0.0))  # which early checkpoints do not know
        self._goes_on, self.origin = checkpoints.beginning_of(state, self.config, self.origin)
        self._measured_before = state.get("measured") if self._goes_on else None
        ranks, rank = state["ranks"], self.shard.rank
        carries = carries_to_resume(ranks, self.shard, by_rows=self.task.carry_rows, path=path)
        self._take_step.carries = batch_to(carries, self.device)
        if rank < len(ranks):
            checkpoints.set_rng_state(ranks[rank]["rng"], self.device)
        else:  # a new rank begins with numbers of its own
            torch.manual_seed(torch.initial_seed() + NEW_RANK * self.step)
        self._evaluation_due = state.get("evaluation_due")
        # fewer ranks leave out a part of the row that the interruption cut; the weights do not depend on it
        window = ranks[rank].get("window") if rank < len(ranks) else None
        if window is not None:
            self._take_step.window.load(batch_to(window, self.device))
