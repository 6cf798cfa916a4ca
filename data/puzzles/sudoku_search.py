"""Count the solutions of many Sudoku puzzles at once, fill random grids, and remove clues.

A state holds the candidates of all cells of one grid as bits. Constraint propagation and branching run on whole arrays
of states (n * n, N): one numpy operation serves all puzzles.
"""

from __future__ import annotations

import numpy as np

from data.puzzles.sudoku_grid import units, units_of_cells

WIDTH = 4096  # states that are propagated together
POPULATION = np.array([bin(i).count("1") for i in range(512)], dtype=np.uint8)


def candidates_of(puzzles: np.ndarray, size: int) -> np.ndarray:
    """Return the candidate bits (n * n, N) of `puzzles` (N, n * n): one bit for a clue, all for a blank."""
    clues = puzzles.T.astype(np.uint16)
    return np.where(clues > 0, np.uint16(1) << (np.maximum(clues, 1) - 1), np.uint16((1 << size) - 1)).astype(np.uint16)


def propagate(states: np.ndarray, size: int) -> np.ndarray:
    """Apply naked and hidden singles to `states` (n * n, N) until nothing changes; return, as (N,), who stays possible.

    Writes into `states`. A state is impossible where a cell has no candidate, or a unit no place for a digit.
    """
    members, cell_units = units(size), units_of_cells(size)
    full = np.uint16((1 << size) - 1)
    possible = np.ones(states.shape[1], dtype=bool)
    active = np.arange(states.shape[1])
    while active.size:
        own = states[:, active]
        single = (own & (own - np.uint16(1))) == 0
        fixed = np.where(single, own, np.uint16(0))
        once, twice, taken = (np.zeros((len(members), active.size), dtype=np.uint16) for _ in range(3))
        for place in range(size):
            here = own[members[:, place]]
            twice |= once & here
            once |= here
            taken |= fixed[members[:, place]]
        fits = (once == full).all(axis=0) & (own != 0).all(axis=0)
        row, column, box = cell_units
        hidden = once & ~twice
        forced = own & (hidden[row] | hidden[column] | hidden[box])
        left = own & ~(taken[row] | taken[column] | taken[box])
        new = np.where(single, own, np.where(forced != 0, forced, left))
        changed = (new != own).any(axis=0) & fits
        states[:, active] = new
        possible[active[~fits]] = False
        active = active[changed]
    return possible


def count_solutions(states: np.ndarray, size: int, *, limit: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Count the solutions of every state, up to `limit`, and return the first one found.

    Args:
        states: (n * n, N) candidates; see `candidates_of`. Not changed.

    Returns:
        counts (N,), at least min(limit, number of solutions), and solutions (N, n * n), zeros where there is none.
    """
    counts = np.zeros(states.shape[1], dtype=np.int64)
    solutions = np.zeros((states.shape[1], size * size), dtype=np.uint8)
    stack = [(states.copy(), np.arange(states.shape[1]))]
    while stack:
        states, owners = stack.pop()
        if states.shape[1] > WIDTH:  # depth first on a part, so that the memory stays bounded
            stack.append((states[:, WIDTH:], owners[WIDTH:]))
            states, owners = states[:, :WIDTH].copy(), owners[:WIDTH]
        wanted = counts[owners] < limit
        states, owners = states[:, wanted], owners[wanted]
        possible = propagate(states, size)
        states, owners = states[:, possible], owners[possible]
        left = POPULATION[states]
        solved = (left == 1).all(axis=0)
        np.add.at(counts, owners[solved], 1)
        solutions[owners[solved]] = _digits(states[:, solved])
        states, owners, left = states[:, ~solved], owners[~solved], left[:, ~solved]
        if owners.size:
            stack.append(_branch(states, owners, left, size))
    return counts, solutions


def random_grids(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Fill `count` grids at random, as (count, n * n).

    The first row is drawn, then a random candidate of a cell with the fewest ones, until every cell is filled; a grid
    that becomes impossible starts again. Every grid can occur, not all are equally likely.
    """
    states = np.full((size * size, count), (1 << size) - 1, dtype=np.uint16)
    states[:size] = np.uint16(1) << random.random((count, size)).argsort(axis=1).T.astype(np.uint16)
    start, unfinished = states.copy(), np.arange(count)
    while unfinished.size:
        own = states[:, unfinished]
        impossible = ~propagate(own, size)
        own[:, impossible] = start[:, unfinished[impossible]]
        left = POPULATION[own]
        place = np.where(left > 1, left + random.random(left.shape), size + 2).argmin(axis=0), np.arange(left.shape[1])
        bits = own[place][:, None] & (np.uint16(1) << np.arange(size, dtype=np.uint16))
        own[place] = np.take_along_axis(bits, (random.random(bits.shape) * (bits > 0)).argmax(axis=1)[:, None], 1)[:, 0]
        states[:, unfinished] = own
        unfinished = unfinished[(left > 1).any(axis=0)]
    return _digits(states)


def remove_clues(grids: np.ndarray, clues: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Blank cells of `grids` (N, n * n) in a random order, as long as the solution stays unique.

    Stops at `clues` (N,) clues left, or when every cell has been tried: the result may have more clues than asked for.
    """
    puzzles = grids.copy()
    order = random.random(grids.shape).argsort(axis=1)
    for cells in order.T:
        open_ = np.flatnonzero((puzzles > 0).sum(axis=1) > clues)
        if not open_.size:
            break
        cell = cells[open_]
        states = candidates_of(puzzles[open_], size)
        # the solution stays unique where no other digit is possible in the cell
        states[cell, np.arange(open_.size)] ^= np.uint16((1 << size) - 1)
        others, _ = count_solutions(states, size, limit=1)
        puzzles[open_, cell] = np.where(others > 0, puzzles[open_, cell], 0)
    return puzzles


def _digits(states: np.ndarray) -> np.ndarray:
    """Return the grids (N, n * n) of `states` (n * n, N) with one candidate in every cell."""
    return np.ascontiguousarray(np.log2(states).astype(np.uint8).T + np.uint8(1))


def _branch(states: np.ndarray, owners: np.ndarray, left: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every state once for each candidate of one of its narrowest cells."""
    cell = np.where(left > 1, left, size + 1).argmin(axis=0)
    children = []
    for digit in range(size):
        bit = np.uint16(1 << digit)
        has = np.flatnonzero(states[cell, np.arange(owners.size)] & bit)
        child = states[:, has]
        child[cell[has], np.arange(has.size)] = bit
        children.append((child, owners[has]))
    return np.concatenate([c for c, _ in children], axis=1), np.concatenate([o for _, o in children])
