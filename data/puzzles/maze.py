"""Mazes with one path between any two open cells, generated; the solution marks the path from start to goal.

Tokens: 1 wall, 2 open, 3 start, 4 goal, 5 path. The solution repeats the maze with the inside of the path marked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.puzzles.base import PuzzleSet
from data.puzzles.generated import GeneratedPuzzles, check_range
from data.puzzles.orbits import in_blocks, mix

WALL, OPEN, START, GOAL, PATH = 1, 2, 3, 4, 5
VOCABULARY = 6
SIZES = range(8, 31)
MADE_AT_ONCE = 64


@dataclass(kw_only=True, eq=False)
class Mazes(GeneratedPuzzles):
    """Perfect mazes: passages form a tree, so that the shortest path is the only one.

    A depth-first walk carves passages between the odd cells of the greatest odd square that fits; with an even `size`
    the last row and column are wall. Start and goal are open cells at a distance drawn uniformly from `path`, as in the
    Maze-Unique set of EqR (arXiv 2605.21488, 30 x 30 with 100 to 140 moves). The eight symmetries of the square are the
    augmentation, and decide, as for `Sudoku`, which split a maze belongs to.

    Args:
        size: side of the square grid, 8 to 30.
        path: least and greatest number of moves from start to goal.
        num_train, num_valid, num_test, generation_seed: see `GeneratedPuzzles`.
        batch_size, eval_batch_size, passes, augment, subset, test_subset, seed: see `Puzzles`.

    Raises:
        ValueError: an argument is out of range.
        DataError: fewer mazes exist with a path that long.
    """

    size: int
    path: Sequence[int]

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size not in SIZES:
            raise ValueError(f"size={self.size!r} must be an integer from {SIZES[0]} to {SIZES[-1]}")
        self.check_numbers()
        longest = 2 * ((inner_size(self.size) - 1) // 2) ** 2 - 2
        fits = f", the most that fit a maze of size={self.size}"
        self.path = check_range("path", self.path, "moves from start to goal", most=longest, also=fits)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return VOCABULARY

    def transformed(self, puzzles: PuzzleSet, random: np.random.Generator) -> PuzzleSet:
        which = random.integers(8, size=len(puzzles.inputs))
        return PuzzleSet(*(turned(part, self.size)[which, np.arange(len(part))] for part in puzzles))

    def orbit_keys(self, puzzles: PuzzleSet) -> np.ndarray:
        return orbit_keys(puzzles.inputs, self.size)

    def make(self, random: np.random.Generator) -> tuple[PuzzleSet, np.ndarray]:
        pairs = [pair for _ in range(MADE_AT_ONCE) if (pair := make_maze(self.size, self.path, random)) is not None]
        if not pairs:
            return PuzzleSet(*np.empty((2, 0, self.size**2), dtype=np.uint8)), np.empty(0, dtype=np.uint64)
        puzzles = PuzzleSet(*np.array(pairs, dtype=np.uint8).swapaxes(0, 1))
        return puzzles, self.orbit_keys(puzzles)


def make_maze(size: int, path: Sequence[int], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a maze and its solution, (size * size,) tokens each; None where the goal drawn is too near or too far."""
    grid = np.full((size, size), WALL, dtype=np.uint8)
    rooms = (inner_size(size) - 1) // 2
    carve(grid, rooms, random)
    free = np.argwhere(grid == OPEN)
    start = tuple(free[random.integers(len(free))].tolist())
    before = _walk(grid, start)
    lengths = {start: 0}
    for cell in before:  # in the order of the walk: a cell's predecessor has its length already
        lengths[cell] = lengths[before[cell]] + 1
    wanted = random.integers(path[0], path[1] + 1)
    goals = [cell for cell, length in lengths.items() if length == wanted]
    if not goals:
        return None
    goal = goals[random.integers(len(goals))]
    grid[start], grid[goal] = START, GOAL
    solution, cell = grid.copy(), before[goal]
    while cell != start:
        solution[cell] = PATH
        cell = before[cell]
    return grid.reshape(-1), solution.reshape(-1)


def carve(grid: np.ndarray, rooms: int, random: np.random.Generator) -> None:
    """Open a random spanning tree of rooms x rooms cells, which lie at the odd positions of `grid`, depth first."""
    room = (int(random.integers(rooms)), int(random.integers(rooms)))
    grid[2 * room[0] + 1, 2 * room[1] + 1] = OPEN
    trail = [room]
    while trail:
        i, j = trail[-1]
        near = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        closed = [(a, b) for a, b in near if 0 <= a < rooms and 0 <= b < rooms and grid[2 * a + 1, 2 * b + 1] == WALL]
        if not closed:
            trail.pop()
            continue
        a, b = closed[random.integers(len(closed))]
        grid[2 * a + 1, 2 * b + 1] = grid[i + a + 1, j + b + 1] = OPEN
        trail.append((a, b))


def inner_size(size: int) -> int:
    """Return the side of the odd square in the corner that holds the maze."""
    return size - 1 + size % 2


def turned(mazes: np.ndarray, size: int) -> np.ndarray:
    """Return the eight symmetric versions of `mazes` (N, size * size), as (8, N, size * size).

    The symmetries are those of the odd square that holds the maze; the last row and column of an even grid stay wall.
    """
    grids = mazes.reshape(-1, size, size)
    inner = inner_size(size)
    versions = np.repeat(grids[None], 8, axis=0)
    square = grids[:, :inner, :inner]
    for i, start in enumerate((square, square.swapaxes(1, 2))):
        for j, flipped in enumerate((start, start[:, ::-1], start[:, :, ::-1], start[:, ::-1, ::-1])):
            versions[4 * i + j, :, :inner, :inner] = flipped
    return versions.reshape(8, len(mazes), -1)


def orbit_keys(mazes: np.ndarray, size: int) -> np.ndarray:
    """Return a 64-bit key per maze (N, size * size), equal for the symmetric versions of one maze."""
    weights = np.random.default_rng(0).integers(2**63, size=mazes.shape[1], dtype=np.uint64)

    def keys(block: np.ndarray) -> np.ndarray:
        # mixed again, for the least of eight numbers is no uniform one
        return mix(mix((turned(block, size).astype(np.uint64) * weights).sum(axis=2)).min(axis=0))

    return in_blocks(keys, mazes)


def _walk(grid: np.ndarray, start: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return, for every other open cell, its predecessor on the way from `start`, in breadth-first order."""
    before: dict[tuple[int, int], tuple[int, int]] = {start: start}
    queue = deque([start])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if grid[cell] == OPEN and cell not in before:
                before[cell] = (i, j)
                queue.append(cell)
    del before[start]
    return before
