"""What every source of data offers: a description (`Spec`), training steps and evaluation batches."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch

from phantom.engine.errors import DataError, first_line


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Describe a data set to the rest of the program.

    Args:
        kind: the kind of task; a model class lists the kinds it serves.
        inputs: constructor keywords the model takes from the data, such as `{"in_channels": 3, "num_classes": 10}`.
        sizes: number of examples (images, graphs, tokens) per split.
        baseline: the headline metric, per split, of a model that ignores its input; for records and reports.
        digests: what was read, per split, as a short hash of the content; for records. Empty where none is made.
        notes: how the splits were made and what they share, for records.
    """

    kind: str
    inputs: dict[str, int]
    sizes: dict[str, int]
    baseline: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """The part of every global batch that one process works on.

    Args:
        rank: index of this process.
        world: number of processes.
        micro: parts one process cuts its share into (gradient accumulation).
    """

    rank: int = 0
    world: int = 1
    micro: int = 1

    def parts(self, count: int) -> list[range]:
        """Return this rank's index ranges of a global batch of `count` examples, one per micro-batch, none empty.

        All ranks' parts together cover `range(count)` exactly once. Ranks share every micro-batch, and the cuts between
        micro-batches are the same for any number of ranks: so is what a norm over all ranks sees. A batch too small for
        every rank to get at least one example yields an empty list on every rank, so that ranks never disagree on the
        number of steps.
        """
        if count < self.world:
            return []
        micro = min(self.micro, count // self.world)
        cuts = [count * i // micro for i in range(micro + 1)]
        return [share(range(a, b), self.rank, self.world) for a, b in pairwise(cuts)]

    def parts_of_all(self, count: int, what: str) -> list[range]:
        """Return `parts` of a batch that no rank may go without.

        Args:
            what: the batch in words, or the argument that says how large it is.

        Raises:
            DataError: there are more processes than examples.
        """
        parts = self.parts(count)
        if not parts:
            raise DataError(f"{self.world} processes cannot share {what}: use fewer processes or a larger batch")
        return parts

    def shares(self, count: int, size: int) -> Iterator[range]:
        """Yield this rank's index ranges of every batch of `size` of `count` examples, those that are not empty."""
        for start in range(0, count, size):
            if part := share(range(start, min(start + size, count)), self.rank, self.world):
                yield part


def share(whole: range, rank: int, world: int) -> range:
    """Return one rank's part of a range, of which all ranks together have every index once; it may be empty."""
    size = len(whole)
    return range(whole.start + size * rank // world, whole.start + size * (rank + 1) // world)


class Source(ABC):
    """One data set: splits, batches, and nothing about models or losses.

    Batches are yielded on the CPU. The order of training examples and their augmentation are a pure function of
    (seed, epoch, index), so that a run resumed in the middle of an epoch sees exactly what an unbroken one sees.
    """

    kind: ClassVar[str]  # known before any file is read, so that an impossible pair fails first
    task: ClassVar[str | None] = None  # where to import the task of a kind of your own, as "package.module.Class"
    spec: Spec
    splits: tuple[str, ...]

    def to(self, device: torch.device) -> None:  # noqa: B027 - doing nothing is the right default
        """Move what is kept in memory to `device`; sources that read as they go have nothing to move."""

    @abstractmethod
    def steps(self, epoch: int) -> int:
        """Return the number of optimiser steps of training epoch `epoch`."""

    @abstractmethod
    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Any]]:
        """Yield one list of micro-batches (this rank's share) per optimiser step, beginning at step `start`.

        An empty list means that the global batch is too small for every rank: all ranks skip the step.
        """

    @abstractmethod
    def evaluate(self, split: str, *, shard: Shard) -> Iterator[Any]:
        """Yield the batches of `split`; over all ranks every example appears exactly once."""

    def digests(self) -> dict[str, str]:
        """Return what is read, per split, as a short hash: a run that is resumed must find the same data.

        By default those of `spec`. A source that reads its files late hashes them here, when the run begins.
        """
        return self.spec.digests

    def check_split(self, split: str) -> None:
        """Raise ValueError when this source has no such split."""
        if split not in self.splits:
            raise ValueError(f"split={split!r} does not exist here; choose one of {', '.join(self.splits)}")


def drawn_apart(begin: Callable[[], Iterable[Any]], name: str) -> Iterator[Any]:
    """Yield what `begin()` yields, and give it a stream of its own in the place of torch's global generator.

    A DataLoader draws a seed there whenever it begins. A run that is resumed begins once more: without this, the model
    would find other numbers there than in the unbroken run, and draw other dropout masks.

    Args:
        name: the stream is a function of this name and of the seed of the global generator.
    """

    def whole() -> Iterator[Any]:  # what `begin` itself draws is of the first `next`, too
        yield from begin()

    seed = random.Random(f"{name}/{torch.initial_seed()}").getrandbits(63)
    state = torch.Generator().manual_seed(seed).get_state()
    batches, end = whole(), object()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            batch = next(batches, end)
            state = torch.get_rng_state()
        if batch is end:
            return
        yield batch


def training_steps(source: Source, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Any]]:
    """Yield what `source.train` yields: as many steps as `steps` says, for the length of the run rests on that.

    Raises:
        DataError: it yields fewer, or more.
    """
    expected = source.steps(epoch) - start
    names = f"{type(source).__name__}.train(epoch={epoch}, start={start})"
    found = 0
    begin = partial(source.train, epoch=epoch, start=start, shard=shard)
    for micro_batches in drawn_apart(begin, f"train/{epoch}/{start}"):
        found += 1
        if found > expected:
            break
        yield micro_batches
    if found != expected:
        raise DataError(
            f"{names} yields {'more' if found > expected else f'{found}'} steps where steps({epoch}) promises "
            f"{expected} from there: both must count a last batch that is short, or both leave it out"
        )


def dead_worker(error: BaseException, step: int, command: str = "the same command") -> DataError | None:
    """Return the sentence for a process of torch's DataLoader that has died before `step`; None for other errors.

    Args:
        command: that goes on from the last checkpoint, in words.
    """
    # an exception of the data set itself names a worker, too: "Caught KeyError in DataLoader worker process 0"
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker (pid"):
        return None
    return DataError(
        f"a process that loads data died before step {step} ({first_line(error)}): most often the memory is "
        "full. Use a smaller data.workers, or data.workers=0, which shows an error of the data itself; "
        f"{command} goes on from the last checkpoint"
    )
