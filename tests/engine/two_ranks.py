"""What each of two processes does in `test_two_ranks.py`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from phantom.engine.artifacts import checkpoint as checkpoints
from phantom.engine.errors import ConfigError
from phantom.engine.machine import distributed
from phantom.engine.machine.signals import Interrupted
from phantom.engine.measure.timing import StepTimer
from phantom.engine.training.clipping import ClipTotal
from phantom.engine.training.evaluation import evaluate
from phantom.engine.training.loop import Trainer
from phantom.engine.training.rules import Penalty, Rules
from tests.engine import tiny
from tests.engine.tiny import Killed, Killing, Shard
from tests.phantom.processes import join, leave
from tests.tiny_run import tiny_run

TARGET = 60.0  # percent of forty validation vectors


def activity(f, z):
    """A penalty without random probes: the mean square of f at the equilibrium, over all problems."""
    return f(z.detach()).square().mean()


def trainer(
    folder: Path, rank: int, world: int, *, noisy: bool, count: int = 12, micro: int = 1, **changes: Any
) -> Trainer:
    """Return one rank's trainer; `noisy` has dropout and batch statistics, where ranks must differ from one process."""
    torch.manual_seed(0)
    model = tiny.Classifier(dropout=0.3, batch_norm=True) if noisy else tiny.Classifier()
    wrapped = distributed.wrap(model, tiny.CPU, world, sync_batchnorm=False)
    penalty = None if noisy else Penalty(regularizer=activity, weight=0.3)
    usual = {
        "unwrapped": model,
        "model": wrapped,
        "source": tiny.Vectors(count=count, batch_size=4),
        "shard": Shard(rank=rank, world=world, micro=micro),
        "rules": Rules(solver=tiny.SOLVER, grad=tiny.GRAD, seed=0, penalty=penalty),
        "clipping": ClipTotal(max_norm=0.5),
        "ema_decay": 0.7 if noisy else None,
        "budget": tiny.budget(epochs=3, checkpoint_every=2),
    }
    result = tiny.trainer(folder, **(usual | changes))
    torch.manual_seed(rank + 1)  # as a real run does, once the weights are made
    return result


def exact(folder: Path, rank: int, world: int, *, micro: int) -> None:
    """Eleven examples in batches of four: the last batch has three, which two ranks share unequally."""
    run = trainer(folder, rank, world, noisy=False, count=11, micro=micro)
    run.timer = run._take_step.timer = StepTimer(tiny.CPU, warmup=0)
    run.fit(resume=False)
    if rank == 0:
        (folder / "items").write_text(str([items for _, items in run.timer._steps]))


def short(folder: Path, rank: int, world: int) -> None:
    """Nine examples in batches of four: the last batch has one, too few for two ranks."""
    trainer(folder, rank, world, noisy=False, count=9).fit(resume=False)


def interrupted(folder: Path, rank: int, world: int, *, step: int | None) -> None:
    """Train with carries, dropout and batch statistics; stopped before `step` and resumed unless it is None."""

    def fit(source) -> None:
        trainer(folder, rank, world, noisy=True, micro=2, task=tiny.WarmStart(), source=source).fit(resume=True)

    if step is not None:
        with pytest.raises(Killed):
            fit(Killing(step=step, batch_size=8))
    fit(tiny.Vectors(count=24, batch_size=8))


class Signalling(tiny.Vectors):
    """Vectors whose second rank is asked to stop before step 2."""

    def train(self, *, epoch: int, start: int, shard: Shard):
        for i, batches in enumerate(super().train(epoch=epoch, start=start, shard=shard), start):
            if i == 2 and shard.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batches


def stopped(folder: Path, rank: int, world: int) -> None:
    """Stop by a signal while the first rank writes slowly; each rank notes what it finds as it leaves."""
    save = checkpoints.save

    def slow(path: Path, state: dict[str, Any]) -> None:
        time.sleep(1.0)
        save(path, state)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoints, "save", slow)
        budget = tiny.budget(epochs=1, checkpoint_every=None)
        trainer(folder, rank, world, noisy=False, source=Signalling(count=40, batch_size=4), budget=budget).fit(
            resume=True
        )
    (folder / f"left{rank}").write_text(str((folder / "last.pt").exists()))


def batch_statistics(folder: Path, rank: int, world: int, *, ema: float | None) -> None:
    run = trainer(folder, rank, world, noisy=True, ema_decay=ema)
    run.fit(resume=False)
    buffers = dict(run.evaluated_model.named_buffers())
    torch.save({"buffers": buffers, "final": run.final, "best": run.best}, folder / f"rank{rank}.pt")


def target(folder: Path, rank: int, world: int) -> None:
    """Stop at a target; each rank notes where it stopped."""
    changes = {"count": 40, "budget": tiny.budget(epochs=3, eval_every=1, target=TARGET)}
    run = trainer(folder, rank, world, noisy=False, **changes)
    run.fit(resume=False)
    torch.save({"step": run.step, "reached": run.reached, "best": run.best}, folder / f"rank{rank}.pt")


def one_example(folder: Path, rank: int, world: int) -> None:
    """One example to evaluate on, which one of the ranks has; and none at all, of which both must say so."""
    run = trainer(folder, rank, world, noisy=False, count=1)
    options = {"shard": run.shard, "device": tiny.CPU, "precision": "fp32"}
    metrics = evaluate(run.unwrapped, run.task, run.source, "test", **options)
    torch.save(metrics, folder / f"rank{rank}.pt")
    with pytest.raises(ConfigError, match="'test' has no batch: use another split"):
        evaluate(run.unwrapped, run.task, tiny.Vectors(count=0), "test", **options)


def command_line(folder: Path, world: int) -> None:
    """One step of train.py on a model with dropout, in the group of processes that is there."""
    os.environ["WORLD_SIZE"] = str(world)
    tiny_run(folder, "model.dropout=0.5", "steps=1")


def main(rank: int, world: int, folder: Path) -> None:
    """Run all jobs in a group of `world` processes."""
    join(rank, world, folder)
    for micro in (1, 2):
        exact(folder / f"exact{micro}", rank, world, micro=micro)
    short(folder / "short", rank, world)
    for step in (None, 3, 5):
        interrupted(folder / f"interrupted{step}", rank, world, step=step)
    for ema in (None, 0.7):
        name = folder / f"statistics{ema}"
        name.mkdir(exist_ok=True)
        batch_statistics(name, rank, world, ema=ema)
    (folder / "stopped").mkdir(exist_ok=True)
    stopped(folder / "stopped", rank, world)
    (folder / "target").mkdir(exist_ok=True)
    target(folder / "target", rank, world)
    (folder / "one").mkdir(exist_ok=True)
    one_example(folder / "one", rank, world)
    command_line(folder / "command_line", world)
    leave()
