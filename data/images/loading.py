"""Batches of pictures that worker processes decode ahead of the training process, in an order that is given."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from data.images.decoding import Example, Transform, batch_of
from phantom.engine.errors import DataError

Batch = tuple[Tensor, Tensor]
Keys = Sequence[tuple[int, int]]  # (epoch, index) of every picture of a batch
END = signal.SIGUSR1  # to a worker: end


class Examples(Protocol):
    """Picture files by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Indexed(Dataset):
    """Batches of pictures that can be read in any order.

    Args:
        transform: from pixels (3, H, W) uint8 to pixels (3, h, w) uint8 of one size; its draws depend on (seed, epoch,
            index) alone.
    """

    def __init__(self, examples: Examples, transform: Transform, seed: int) -> None:
        self.examples, self.transform, self.seed = examples, transform, seed

    def __getitem__(self, keys: Keys) -> Batch:
        pairs = ((_key(self.seed, epoch, index), self.examples[index]) for epoch, index in keys)
        return batch_of(pairs, self.transform)


class Streamed(IterableDataset):
    """Batches of pictures that are read in one pass, such as a stream from a network.

    A worker keeps the pictures that its own batches need later, and no others.

    Args:
        read: yields (index, example) for those of the indices that it is given, in the order of the pass.
        shares: the keys of every batch.
    """

    def __init__(
        self,
        read: Callable[[frozenset[int]], Iterable[tuple[int, Example]]],
        transform: Transform,
        seed: int,
        shares: Sequence[Keys],
    ) -> None:
        self.read, self.transform, self.seed, self.shares = read, transform, seed, shares

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        # torch takes a batch of every worker in turn
        shares = self.shares if worker is None else self.shares[worker.id :: worker.num_workers]
        stream = iter(self.read(frozenset(index for share in shares for _, index in share)))
        held: dict[int, Example] = {}

        def take(index: int) -> Example:
            while index not in held:
                number, example = next(stream)
                held[number] = example
            return held.pop(index)

        for share in shares:
            pairs = ((_key(self.seed, epoch, index), take(index)) for epoch, index in share)
            yield batch_of(pairs, self.transform)


class Loader:
    """Decode the batches of one split in worker processes, which stay from epoch to epoch, one thread each.

    Args:
        workers: processes; 0 decodes in this one.
    """

    def __init__(self, pictures: Indexed, workers: int) -> None:
        self._pictures, self._workers = pictures, workers
        self._order = _Order()
        self._kept: DataLoader | None = None
        self._busy = False

    def batches(self, shares: Sequence[Keys]) -> Iterator[Batch]:
        """Yield a batch per share, in the order of shares."""
        if self._busy or self._workers == 0:  # the workers serve one pass at a time: this one has others
            yield from batches(self._pictures, self._workers, sampler=shares)
            return
        self._busy, self._order.shares = True, shares
        try:
            if self._kept is None:
                self._kept = loader(self._pictures, self._workers, sampler=self._order, persistent_workers=True)
            yield from _told(self._kept)
        finally:
            self._busy = False


class _Order:
    """The batches of the pass that begins next: torch fixes a loader's sampler when it makes the loader."""

    shares: Sequence[Keys] = ()

    def __iter__(self) -> Iterator[Keys]:
        return iter(self.shares)


def loader(pictures: Dataset, workers: int, **options: Any) -> DataLoader:
    """Return a loader of whole batches; two a worker are ready before they are asked for."""
    return DataLoader(
        pictures,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # without it, torch draws the workers' seeds from its global one
        **options,
    )


def _leave_signals(worker: int) -> None:
    """Leave signals to the parent: a scheduler sends them to every process, and the parent saves first."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END, lambda *_: os._exit(0))


def _end_workers() -> None:
    """End workers that wait for more when the program ends; Python would wait for ever for them to heed SIGTERM."""
    for child in multiprocessing.active_children():
        if child.daemon and child.pid is not None:
            os.kill(child.pid, END)


def batches(pictures: Dataset, workers: int, **options: Any) -> Iterator[Batch]:
    """Yield the batches of one pass, by workers of its own."""
    yield from _told(loader(pictures, workers, **options))


def _told(found: DataLoader) -> Iterator[Batch]:
    try:
        passing = iter(found)
        if found.num_workers:
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)  # before torch's own, which gives every worker five seconds
        yield from passing
    except DataError as error:
        # torch puts a worker's whole traceback into the message; its last line holds the class and our message
        prefix = f"{DataError.__module__}.{DataError.__qualname__}: "
        raise DataError(str(error).strip().splitlines()[-1].removeprefix(prefix)) from None


def _key(seed: int, epoch: int, index: int) -> str:
    return f"augment/{seed}/{epoch}/{index}"
