"""The stored steps of Broyden's method as a ring, and how its arithmetic reads and writes a position of it.

B problems, D unknowns each, n stored steps. A position is a number, or in compiled code a mask (n,) that is True there
alone: one kernel serves every position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LANES = 8  # float32 numbers in a vector register


@dataclass
class Steps:
    """The last `limit` steps of a solve in a ring, and the small matrices that make the next one.

    Everything is in ring order: position i mod `limit` holds step i. Room is made as steps are taken, so that a solve
    costs what its steps cost, whatever its budget; positions not used yet hold zeros.

    Args:
        steps: (room, B, D), step axis first, so that appending is one contiguous write.
        gram: (B, room, room) inner products of the stored steps.
        coefficients: (B, room, room) the matrix C of `Broyden`.
        limit: most steps to keep.
        masks: (room, room) row i is True at i alone; for compiled arithmetic, where one kernel serves every position.
        reads: whether the host looks at every step for factors that are noise.
        count: steps taken so far, those no longer stored included.
    """

    steps: Tensor
    gram: Tensor
    coefficients: Tensor
    limit: int
    masks: Tensor | None = None
    reads: bool = False
    count: int = 0
    _views: tuple[Any, ...] = (0,)

    def make_room(self) -> None:
        """Double the room where the next step finds none."""
        room, batch, width = self.steps.shape
        if self.count < room or room == self.limit:
            return
        more = min(2 * room, self.limit)
        steps, small = self.steps.new_empty((more, batch, width)), self.gram.new_zeros((2, batch, more, more))
        steps[:room], small[0, :, :room, :room], small[1, :, :room, :room] = self.steps, self.gram, self.coefficients
        self.steps, self.gram, self.coefficients, self._views = steps, small[0], small[1], (0,)
        self.masks = None if self.masks is None else torch.eye(more, dtype=torch.bool, device=steps.device)

    def width(self, n: int) -> int:
        """Return how many columns of the small matrices to use for `n` steps.

        They fill whole vector registers, so that sums over them have the order, and the rounding, of sums over all of
        `limit`.
        """
        if self.masks is not None:
            return len(self.masks)
        width = -(-n // LANES) * LANES
        return width if width <= self.limit // LANES * LANES else self.limit

    def small(self, width: int) -> tuple[Tensor, Tensor]:
        """Return the first `width` rows and columns of both small matrices, (B, width, width) each."""
        if self._views[0] != width:
            self._views = width, (self.gram[:, :width, :width], self.coefficients[:, :width, :width])
        return self._views[1]

    def place(self, position: int) -> int | Tensor:
        """Return the position as the arithmetic takes it."""
        return position if self.masks is None else self.masks[position]

    def apply_inverse_transposed(self, v: Tensor) -> Tensor:
        """Return H^T v (B, D) for `v` (B, D), H the estimate of (I - J)^{-1} that the stored steps make.

        H v = v + sum_l (C S v)_l s_{l+1}, so H^T v = v + sum_j (C^T b)_j s_j with b_l = <s_{l+1}, v>.
        """
        n = min(self.count, self.limit)
        if n == 0:  # the start met tol
            return v
        stored = self.steps[:n]
        products = put(project(stored, v).roll(-1, 1), (self.count - 1) % n, 0.0)
        weights = times(self.coefficients[:, :n, :n].mT, products)
        return torch.baddbmm(v[:, None, :], weights[:, None, :], stored.transpose(0, 1))[:, 0]


def project(stored: Tensor, v: Tensor) -> Tensor:
    """Return <s_j, v> (B, n): a row vector times (D, n), several times faster in BLAS than the column form."""
    return torch.bmm(v.unsqueeze(1), stored.permute(1, 2, 0)).squeeze(1)


def widened(rows: Tensor, width: int) -> Tensor:
    """Return `rows` (B, n) with zeros up to `width` columns."""
    missing = width - rows.shape[1]
    return torch.constant_pad_nd(rows, (0, missing)) if missing else rows


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.linalg.vecdot(matrix, vector.unsqueeze(1), dim=2)


def at_next(rows: Tensor, here: int | Tensor, full: bool) -> Tensor:
    """Return, for every position, the entry of `rows` (B, n) at the next one of the ring; 0 for the newest, `here`."""
    if full or isinstance(here, Tensor):
        return put(rows.roll(-1, 1), here, 0.0)
    return torch.constant_pad_nd(rows, (-1, 1))  # beyond the newest all are zero


def at_previous(rows: Tensor, newest: int | Tensor, here: int | Tensor, full: bool) -> Tensor:
    """Return, for every position, the entry of `rows` (B, n) at the one before; 0 for that of the step to come, `here`.

    c_l weighs the step after l; the one after the newest is not there yet.
    """
    if full or not isinstance(newest, int):
        return put(rows.roll(1, 1), here, 0.0)
    return torch.constant_pad_nd(rows[:, :newest], (1, rows.shape[1] - newest - 1))


def pick(rows: Tensor, at: int | Tensor) -> Tensor:
    """Return the entries (B,) of `rows` (B, n) at a position."""
    return rows.select(1, at) if isinstance(at, int) else (rows * at).sum(1)


def put(rows: Tensor, at: int | Tensor, value: Tensor | float) -> Tensor:
    """Return `rows` (B, n), which may be written to, with `value` () or (B,) at a position."""
    if isinstance(at, int):
        column = rows.select(1, at)
        column.copy_(value) if isinstance(value, Tensor) else column.fill_(value)
        return rows
    return torch.where(at, value[:, None] if isinstance(value, Tensor) else value, rows)


def fill_row(matrix: Tensor, at: int | Tensor, row: Tensor) -> None:
    """Write `row` (B, n) into the row of `matrix` (B, n, n) at a position."""
    if isinstance(at, int):
        matrix.select(1, at).copy_(row)
    else:
        matrix.copy_(torch.where(at[:, None], row[:, None, :], matrix))


def fill_column(matrix: Tensor, at: int | Tensor, column: Tensor) -> None:
    """Write `column` (B, n) into the column of `matrix` (B, n, n) at a position."""
    if isinstance(at, int):
        matrix.select(2, at).copy_(column)
    else:
        fill_row(matrix.mT, at, column)


def drop(matrix: Tensor, at: int | Tensor, problems: Tensor) -> None:
    """Write zeros into the row of `matrix` (B, n, n) at a position, for the `problems` (B,) that say so."""
    if isinstance(at, int):
        matrix.select(1, at).masked_fill_(problems[:, None], 0.0)
    else:
        matrix.masked_fill_(at[:, None] & problems[:, None, None], 0.0)
