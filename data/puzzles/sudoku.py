"""Sudoku of 4 x 4, 6 x 6 and 9 x 9 cells, generated.

Token 1 is a blank cell, token d + 1 the digit d. A solution fills in all cells, the given ones included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.puzzles.base import Puzzles, PuzzleSet, collect
from data.puzzles.grid import check_size, orbit_keys, random_symmetries, transform
from data.puzzles.solver import random_grids, remove_clues
from phantom.validate import check_count

MADE_AT_ONCE = 256


class SudokuTokens(Puzzles):
    """Sudoku as tokens, under the symmetries of the grid; `size` digits."""

    @property
    def vocab_size(self) -> int:
        return self.size + 2

    def transformed(self, puzzles: PuzzleSet, random: np.random.Generator) -> PuzzleSet:
        cells, digits = random_symmetries(len(puzzles.inputs), self.size, random)
        return PuzzleSet(*(transform(part - 1, cells, digits) + 1 for part in puzzles))

    def orbit_keys(self, puzzles: PuzzleSet) -> np.ndarray:
        return orbit_keys(puzzles.inputs - 1, puzzles.labels - 1, self.size)


@dataclass(kw_only=True, eq=False)
class Sudoku(SudokuTokens):
    """Generated puzzles with one solution each.

    Clues are removed from a random full grid in a random order as long as the solution stays unique. Whether a puzzle
    belongs to training or to a held-out split is decided by its orbit, puzzle and solution together, under all
    symmetries of the grid (`data.puzzles.grid.orbit_keys`): no test puzzle is a disguised training puzzle. There are
    288 full grids of 4 x 4 in two orbits only, so that a split by solution does not exist there.

    Args:
        size: digits, 4, 6 or 9.
        clues: least and greatest number of given cells, drawn uniformly; fewer are harder.
        num_train, num_valid, num_test: puzzles per split; without valid ones there is no split `valid`.
        generation_seed: of the puzzles.
        batch_size, eval_batch_size, passes, augment, subset, test_subset, seed: see `Puzzles`.

    Raises:
        ValueError: an argument is out of range.
        DataError: fewer puzzles exist with that few clues.
    """

    size: int
    clues: Sequence[int]
    num_train: int
    num_valid: int
    num_test: int
    generation_seed: int

    def __post_init__(self) -> None:
        check_size(self.size)
        check_count("num_train", self.num_train, least=1)
        check_count("num_valid", self.num_valid, least=0)
        check_count("num_test", self.num_test, least=1)
        self.clues = check_clues(self.clues, self.size)
        super().__post_init__()

    def load(self) -> Mapping[str, PuzzleSet]:
        valid = {"valid": self.num_valid} if self.num_valid else {}
        sizes = {"test": self.num_test, **valid, "train": self.num_train}
        return collect(self._make, sizes, seed=self.generation_seed)

    def _make(self, random: np.random.Generator) -> tuple[PuzzleSet, np.ndarray]:
        grids = random_grids(MADE_AT_ONCE, self.size, random)
        wanted = random.integers(self.clues[0], self.clues[1] + 1, size=MADE_AT_ONCE)
        puzzles = remove_clues(grids, wanted, self.size, random)
        reached = (puzzles > 0).sum(axis=1) == wanted
        puzzles, grids = puzzles[reached], grids[reached]
        made = PuzzleSet(puzzles + 1, grids + 1)
        return made, self.orbit_keys(made)


def check_clues(clues: Sequence[int], size: int) -> tuple[int, int]:
    """Return the least and the greatest number of clues.

    Raises:
        ValueError: they are not two integers in order, or not fewer than the cells.
    """
    cells = size * size
    pair = tuple(clues) if isinstance(clues, Sequence) and not isinstance(clues, str) else ()
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in pair)
    if len(pair) != 2 or not whole or not 1 <= pair[0] <= pair[1] < cells:
        raise ValueError(
            f"clues={clues!r} must be the least and the greatest number of given cells, such as [{size}, {2 * size}], "
            f"in order and between 1 and {cells - 1}"
        )
    return pair
