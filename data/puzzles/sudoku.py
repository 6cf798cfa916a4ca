"""Sudoku of 4 x 4, 6 x 6 and 9 x 9 cells, generated.

Token 1 is a blank cell, token d + 1 the digit d. A solution fills in all cells, the given ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.puzzles.base import Puzzles, PuzzleSet
from data.puzzles.generated import GeneratedPuzzles, check_range
from data.puzzles.sudoku_grid import check_size, orbit_keys, random_symmetries, transform
from data.puzzles.sudoku_search import random_grids, remove_clues

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
class Sudoku(SudokuTokens, GeneratedPuzzles):
    """Generated puzzles with one solution each.

    Clues are removed from a random full grid in a random order as long as the solution stays unique. Whether a puzzle
    belongs to training or to a held-out split is decided by its orbit, puzzle and solution together, under all
    symmetries of the grid (`sudoku_grid.orbit_keys`): no test puzzle is a disguised training puzzle. There are 288 full
    grids of 4 x 4 in two orbits only, so that a split by solution does not exist there.

    Args:
        size: digits, 4, 6 or 9.
        clues: least and greatest number of given cells, drawn uniformly; fewer are harder.
        num_train, num_valid, num_test, generation_seed: see `GeneratedPuzzles`.
        batch_size, eval_batch_size, passes, augment, subset, test_subset, seed: see `Puzzles`.

    Raises:
        ValueError: an argument is out of range.
        DataError: fewer puzzles exist with that few clues.
    """

    size: int
    clues: Sequence[int]

    def __post_init__(self) -> None:
        check_size(self.size)
        self.check_numbers()
        cells = f"given cells, such as [{self.size}, {2 * self.size}]"
        self.clues = check_range("clues", self.clues, cells, most=self.size**2 - 1)
        super().__post_init__()

    def make(self, random: np.random.Generator) -> tuple[PuzzleSet, np.ndarray]:
        grids = random_grids(MADE_AT_ONCE, self.size, random)
        wanted = random.integers(self.clues[0], self.clues[1] + 1, size=MADE_AT_ONCE)
        puzzles = remove_clues(grids, wanted, self.size, random)
        reached = (puzzles > 0).sum(axis=1) == wanted
        puzzles, grids = puzzles[reached], grids[reached]
        made = PuzzleSet(puzzles + 1, grids + 1)
        return made, self.orbit_keys(made)
