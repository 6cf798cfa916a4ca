"""Keys of orbits: what the 64-bit keys of Sudoku grids and of mazes are made with.

All puzzles that a symmetry maps to one another are one orbit and share a key, so that they lie in one split.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 2048  # puzzles whose keys are computed at a time


def in_blocks(keys: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """Return the key of every row of some arrays, for a few rows at a time: a puzzle takes 60 kB of memory."""
    starts = range(0, max(1, len(arrays[0])), BLOCK)
    return np.concatenate([keys(*(array[start : start + BLOCK] for array in arrays)) for start in starts])


def mix(x: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finaliser of uint64 numbers: sums of its values tell multisets apart."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
