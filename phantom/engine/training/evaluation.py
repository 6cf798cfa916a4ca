"""Evaluate a model on a split: every example once, sums divided once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from phantom.engine.errors import ConfigError
from phantom.engine.machine import distributed
from phantom.engine.machine.precision import autocast
from phantom.engine.measure.solves import SolveMeter
from phantom.engine.source import Shard, Source, drawn_apart
from phantom.engine.tasks.base import Tally, Task


def batch_to(batch: Any, device: torch.device) -> Any:
    """Move a batch (a tensor, a tuple, namedtuple, list or dict of such, or an object with `.to`) to `device`."""
    # by hand, as torch's pytree takes subclasses of list and dict for one leaf
    if isinstance(batch, (tuple, list)):
        items = [batch_to(item, device) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if isinstance(batch, dict):
        return type(batch)({key: batch_to(item, device) for key, item in batch.items()})
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch


class StoppedError(Exception):
    """An evaluation was asked to stop before its end."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    source: Source,
    split: str,
    *,
    shard: Shard,
    device: torch.device,
    precision: str,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return, over all ranks, the task's metrics on `split` and the cost and quality of the solves.

    The model is put in evaluation mode for the call and back afterwards; the carry starts empty.

    Args:
        stop: asked after every batch; where it says yes on any rank, all ranks raise StoppedError.

    Raises:
        ConfigError: the split has no batch, or empty ones alone; every rank raises.
    """
    was_training = model.training
    model.eval()
    total: Tally | None = None
    carry = None
    meter = SolveMeter()
    stopped = False
    try:
        with distributed.stopping_apart(model):
            for batch in drawn_apart(partial(source.evaluate, split, shard=shard), f"evaluate/{split}"):
                with autocast(precision, device):
                    score = task.score(model, batch_to(batch, device), carry)
                carry = score.carry
                tally = score.tally.detach()
                total = tally if total is None else total + tally
                meter.add(score.solutions)
                if stopped := stop():
                    break
    finally:
        model.train(was_training)
    shapes = {} if total is None else {name: value.shape for name, value in total.sums.items()}
    stops, sums = zip(*distributed.gather((stopped, None if total is None else shapes)), strict=True)
    if any(stops):
        raise StoppedError
    names = [own for own in sums if own is not None]
    if names:
        if total is None:  # a split with fewer examples than there are ranks
            zero = torch.zeros((), dtype=torch.float64, device=device)
            total = Tally(zero, 0, {name: zero.expand(shape) for name, shape in names[0].items()})
        total = total.all_reduce()
    if total is None or total.count == 0:  # an empty tensor, cut into batches, is one batch of nothing
        raise ConfigError(f"the split {split!r} has no batch: use another split, or more data")
    return {**task.metrics(total), **meter.report()}
