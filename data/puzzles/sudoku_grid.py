"""Sudoku grids: their units, their symmetries, and a key that is the same for all puzzles of one orbit.

N puzzles, n digits, n * n cells in reading order. A puzzle is (N, n * n) uint8 with 0 for a blank cell.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from data.puzzles.orbits import in_blocks, mix

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box, by n
ROUNDS = 6  # of colour refinement


@cache
def units(size: int) -> np.ndarray:
    """Return the cells of every row, column and box, as (3n, n), in this order."""
    cells = np.arange(size * size).reshape(size, size)
    rows, columns = BOXES[size]
    boxes = cells.reshape(size // rows, rows, size // columns, columns).swapaxes(1, 2).reshape(size, size)
    return np.concatenate([cells, cells.T, boxes])


@cache
def units_of_cells(size: int) -> np.ndarray:
    """Return the row, column and box of every cell, as (3, n * n) indices into `units(size)`."""
    found = np.empty((3, size * size), dtype=np.int64)
    for i, unit in enumerate(units(size)):
        found[i // size, unit] = i
    return found


def check_size(size: int) -> None:
    """Raise ValueError unless the project knows the boxes of a grid of this size."""
    if isinstance(size, bool) or size not in BOXES:
        raise ValueError(f"size={size!r} is not known; choose one of {', '.join(map(str, BOXES))}")


def is_solution(grids: np.ndarray, size: int) -> np.ndarray:
    """Return, as (N,), whether every row, column and box of `grids` (N, n * n) holds every digit once."""
    held = np.sort(grids[:, units(size)], axis=2)
    return (held == np.arange(1, size + 1)).all(axis=(1, 2))


def random_symmetries(count: int, size: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` symmetries; return, for each, where a cell comes from and what a digit becomes.

    The group permutes the digits, the bands of boxes, the rows inside a band, and the same for columns; it transposes
    where boxes are square. It has 4! * 128, 6! * 3456 and 9! * 2 * 6^8 elements.

    Returns:
        cells (count, n * n) and digits (count, n + 1), so that new = digits[old[cells]]; digits keep 0.
    """
    rows, columns = BOXES[size]
    i = _line_order(count, size, rows, random)
    j = _line_order(count, size, columns, random)
    cells = i[:, :, None] * size + j[:, None, :]
    if rows == columns:
        cells = np.where(random.random(count)[:, None, None] < 0.5, cells.swapaxes(1, 2), cells)
    digits = np.zeros((count, size + 1), dtype=np.uint8)
    digits[:, 1:] = _orders(count, size, random) + 1
    return cells.reshape(count, -1), digits


def transform(puzzles: np.ndarray, cells: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Return `puzzles` (N, n * n) under the symmetries of `random_symmetries`, one each."""
    return np.take_along_axis(digits, np.take_along_axis(puzzles, cells, axis=1).astype(np.int64), axis=1)


def _orders(count: int, length: int, random: np.random.Generator) -> np.ndarray:
    return random.random((count, length)).argsort(axis=1)


def _line_order(count: int, size: int, lines: int, random: np.random.Generator) -> np.ndarray:
    """Return permutations (count, n) of rows that keep bands of `lines` rows together."""
    bands = _orders(count, size // lines, random)
    inside = np.stack([_orders(count, lines, random) for _ in range(size // lines)], axis=1)
    return (bands[:, :, None] * lines + inside).reshape(count, size)


def orbit_keys(puzzles: np.ndarray, solutions: np.ndarray, size: int) -> np.ndarray:
    """Return a 64-bit key per puzzle, equal for all puzzles that a symmetry of the grid maps to one another.

    Colour refinement of the cells: the colour says first whether a cell is given, then, round by round, which colours
    its row, column, box and the cells of its digit have. Rows and columns enter symmetrically, and colours alone enter
    the key, so that no symmetry changes it. Two orbits may share a key; they then stay together in a split.

    Args:
        puzzles: (N, n * n), 0 for a blank cell.
        solutions: (N, n * n) the full grids.
    """
    return in_blocks(partial(_orbit_keys, size=size), puzzles, solutions)


def _orbit_keys(puzzles: np.ndarray, solutions: np.ndarray, size: int) -> np.ndarray:
    row, column, box = units_of_cells(size)
    members = units(size)
    colours = mix(1 + (puzzles > 0).astype(np.uint64))
    same_digit = solutions[:, :, None] == solutions[:, None, :]
    for _ in range(ROUNDS):
        sums = mix(colours[:, members].sum(axis=2, dtype=np.uint64))
        digit = mix(np.where(same_digit, colours[:, None, :], 0).sum(axis=2, dtype=np.uint64))
        lines = mix(mix(sums[:, row]) + mix(sums[:, column]))
        colours = mix(3 * colours + 5 * lines + 7 * mix(sums[:, box] + 11) + 13 * digit)
    return mix(colours.sum(axis=1, dtype=np.uint64))
