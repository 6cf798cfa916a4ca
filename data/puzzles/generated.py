"""Sets of generated puzzles: how many of them every split has, and how hard they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.puzzles.base import Puzzles, PuzzleSet, split_of
from data.seeding import seed_of
from phantom.engine.errors import DataError
from phantom.validate import check_count

PATIENCE = 20


@dataclass(kw_only=True, eq=False)
class GeneratedPuzzles(Puzzles):
    """A set of puzzles that it makes itself, all distinct; the orbit of a puzzle decides which split it belongs to.

    Args:
        num_train, num_valid, num_test: puzzles per split; without valid ones there is no split `valid`.
        generation_seed: of the puzzles.
        batch_size, eval_batch_size, passes, augment, subset, test_subset, seed: see `Puzzles`.

    Raises:
        ValueError: an argument is out of range.
        DataError: fewer puzzles of this kind exist.
    """

    num_train: int
    num_valid: int
    num_test: int
    generation_seed: int

    def check_numbers(self) -> None:
        """Raise ValueError unless the numbers of puzzles are in range; a set calls it after the check of its size."""
        check_count("num_train", self.num_train, least=1)
        check_count("num_valid", self.num_valid, least=0)
        check_count("num_test", self.num_test, least=1)

    def load(self) -> Mapping[str, PuzzleSet]:
        sizes = {"test": self.num_test, "valid": self.num_valid, "train": self.num_train}
        return collect(self.make, {name: size for name, size in sizes.items() if size}, seed=self.generation_seed)

    @abstractmethod
    def make(self, random: np.random.Generator) -> tuple[PuzzleSet, np.ndarray]:
        """Return new puzzles, any number of them, and their orbit keys (N,)."""


def check_range(name: str, value: Sequence[int], of: str, *, most: int, also: str = "") -> tuple[int, int]:
    """Return a range of numbers, from which every puzzle draws one, as a pair.

    Args:
        name: of the argument, whose `value` is the least and the greatest number.
        of: what is counted.
        most: the greatest number that fits; 1 is the least.
        also: ends the message, with a reason.

    Raises:
        ValueError: `value` is not two integers in order, from 1 to `most`.
    """
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
    if len(pair) != 2 or not whole or not 1 <= pair[0] <= pair[1] <= most:
        raise ValueError(
            f"{name}={value!r} must be the least and the greatest number of {of}, in order and between 1 and {most}"
            f"{also}"
        )
    return pair


def collect(
    make: Callable[[np.random.Generator], tuple[PuzzleSet, np.ndarray]], sizes: Mapping[str, int], *, seed: int
) -> dict[str, PuzzleSet]:
    """Make puzzles until every split has its number of distinct ones.

    Args:
        make: returns new puzzles with their orbit keys.
        sizes: puzzles per split.
        seed: of the generator that `make` draws from.

    Raises:
        DataError: `PATIENCE` calls of `make` in a row gave no new puzzle for a split that is not full.
    """
    random = np.random.default_rng(seed_of(f"make puzzles/{seed}"))
    found: dict[str, dict[bytes, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in sizes}
    idle = 0
    while any(len(found[name]) < size for name, size in sizes.items()):
        before = sum(map(len, found.values()))
        puzzles, keys = make(random)
        for split, inputs, labels in zip(split_of(keys, sizes), *puzzles, strict=True):
            name = list(sizes)[split]
            if len(found[name]) < sizes[name]:
                found[name][inputs.tobytes()] = (inputs, labels)
        idle = idle + 1 if sum(map(len, found.values())) == before else 0
        if idle == PATIENCE:
            counts = ", ".join(f"{name} {len(found[name])} of {size}" for name, size in sizes.items())
            raise DataError(f"there seem to be no more puzzles of this kind: {counts}; ask for fewer or easier ones")
    return {name: PuzzleSet(*map(np.stack, zip(*rows.values(), strict=True))) for name, rows in found.items()}
