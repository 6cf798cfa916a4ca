"""Puzzles on a grid held in memory: splits by orbit, batches of tokens, a new symmetry of every puzzle in every pass.

N puzzles of S cells. Token 0 is padding, which these sets do not need; every set says what the others mean.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.digests import digest
from data.seeding import seed_of
from phantom.engine.errors import DataError
from phantom.engine.source import Shard, Source, Spec
from phantom.validate import check_counts, check_flag

Batch = tuple[Tensor, Tensor]  # the puzzle and its solution, (B, S) int64 tokens each


class PuzzleSet(NamedTuple):
    """Puzzles and their solutions as tokens, (N, S) uint8 each."""

    inputs: np.ndarray
    labels: np.ndarray

    def take(self, index: np.ndarray | slice) -> PuzzleSet:
        """Return the puzzles at `index`."""
        return PuzzleSet(self.inputs[index], self.labels[index])

    def digest(self) -> str:
        """Return a short hash of the tokens that does not depend on the order of the puzzles."""
        rows = np.concatenate([self.inputs, self.labels], axis=1)
        return digest([rows[np.lexsort(rows.T)].tobytes()])


@dataclass(kw_only=True, eq=False)
class Puzzles(Source):
    """A set of puzzles on square grids to fill in, whose side is the set's own argument `size`: S = size * size.

    The order of the puzzles and the symmetry applied to each are drawn from (seed, epoch, pass) alone. An epoch is one
    stream of `passes` passes cut into batches of exactly `batch_size` puzzles: a model that carries a state from batch
    to batch keeps it for a whole epoch.

    Args:
        batch_size: puzzles per optimiser step, over all processes.
        eval_batch_size: puzzles per evaluation batch.
        passes: times that an epoch walks through the training puzzles.
        augment: apply a random symmetry to every training puzzle, another one in every pass.
        subset: greatest number of training puzzles.
        test_subset: greatest number of test puzzles.
        seed: of order and augmentation; the puzzles themselves do not depend on it.

    Raises:
        ValueError: an argument is out of range.
        DataError: a split has no puzzle, or an epoch is shorter than a batch.
    """

    kind = "puzzle_solving"

    size: int = field(init=False)  # no argument here: every set takes other sizes
    batch_size: int
    eval_batch_size: int
    passes: int
    augment: bool
    subset: int | None
    test_subset: int | None
    seed: int

    def __post_init__(self) -> None:
        check_counts(least=1, batch_size=self.batch_size, eval_batch_size=self.eval_batch_size, passes=self.passes)
        check_flag("augment", self.augment)
        loaded = self.load()
        limits = {"train": self.subset, "test": self.test_subset}
        self._sets = {name: puzzles.take(slice(limits.get(name))) for name, puzzles in loaded.items()}
        self.splits = tuple(self._sets)
        sizes = {name: len(puzzles.inputs) for name, puzzles in self._sets.items()}
        for name, size in sizes.items():
            if size == 0:
                raise DataError(f"the split {name!r} has no puzzle")
        if sizes["train"] * self.passes < self.batch_size:
            raise DataError(
                f"an epoch has {sizes['train']} puzzles in {self.passes} passes, fewer than "
                f"batch_size={self.batch_size}: use a smaller batch_size or more data.passes"
            )
        self.spec = Spec(
            kind=self.kind,
            inputs={"vocab_size": self.vocab_size, "height": self.size, "width": self.size},
            sizes=sizes,
            digests={name: puzzles.digest() for name, puzzles in loaded.items()},
            notes=self._notes(loaded),
        )

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of tokens."""

    @abstractmethod
    def load(self) -> Mapping[str, PuzzleSet]:
        """Return the puzzles of every split, `train` among them."""

    @abstractmethod
    def transformed(self, puzzles: PuzzleSet, random: np.random.Generator) -> PuzzleSet:
        """Return every puzzle under a symmetry of its own, drawn from `random`."""

    @abstractmethod
    def orbit_keys(self, puzzles: PuzzleSet) -> np.ndarray:
        """Return a uint64 key per puzzle (N,), the same for all puzzles that a symmetry maps to one another."""

    def _notes(self, loaded: Mapping[str, PuzzleSet]) -> dict[str, str | int]:
        """Return how many orbits every split has, and how many of its puzzles lie in an orbit of the training split."""
        keys = {name: self.orbit_keys(puzzles) for name, puzzles in loaded.items()}
        counts = {f"{name}_orbits": len(np.unique(found)) for name, found in keys.items()}
        shared = {
            f"{name}_puzzles_in_training_orbits": int(np.isin(found, keys["train"]).sum())
            for name, found in keys.items()
            if name != "train"
        }
        return {"orbits": "puzzle and solution under the symmetries of the grid", **counts, **shared}

    def steps(self, epoch: int) -> int:
        return self.spec.sizes["train"] * self.passes // self.batch_size

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[Batch]]:
        parts = shard.parts_of_all(self.batch_size, f"batch_size={self.batch_size}")
        stream = self._stream(epoch, start * self.batch_size)
        for _ in range(start, self.steps(epoch)):
            batch = next(stream)
            yield [_tensors(batch.take(slice(part.start, part.stop))) for part in parts]

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[Batch]:
        self.check_split(split)
        puzzles = self._sets[split]
        for part in shard.shares(len(puzzles.inputs), self.eval_batch_size):
            yield _tensors(puzzles.take(slice(part.start, part.stop)))

    def _stream(self, epoch: int, begin: int) -> Iterator[PuzzleSet]:
        """Yield batches of the endless stream of passes, from its example `begin` on."""
        count = self.spec.sizes["train"]
        number, skip = divmod(begin, count)
        held = self._pass(epoch, number).take(slice(skip, None))
        while True:
            while len(held.inputs) < self.batch_size:
                number += 1
                held = PuzzleSet(*map(np.concatenate, zip(held, self._pass(epoch, number), strict=True)))
            yield held.take(slice(self.batch_size))
            held = held.take(slice(self.batch_size, None))

    def _pass(self, epoch: int, number: int) -> PuzzleSet:
        random = np.random.default_rng(seed_of(f"puzzles/{self.seed}/{epoch}/{number}"))
        puzzles = self._sets["train"].take(random.permutation(self.spec.sizes["train"]))
        return self.transformed(puzzles, random) if self.augment else puzzles


def split_of(keys: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Return, per orbit key (N,) uint64, the index of the split that its orbit belongs to, in the order of `sizes`.

    The key alone decides, so that puzzles of one orbit never meet in two splits; a split gets orbits in proportion to
    its size.
    """
    shares = np.cumsum(list(sizes.values())) / sum(sizes.values())
    return np.searchsorted(shares, keys.astype(np.float64) / 2.0**64, side="right").clip(max=len(sizes) - 1)


def _tensors(puzzles: PuzzleSet) -> Batch:
    inputs, labels = (torch.from_numpy(part.astype(np.int64)) for part in puzzles)
    return inputs, labels
