"""Anderson acceleration with a relative ridge and an incremental Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from phantom.runtime.host import is_cheap_to_read
from phantom.solver.base import Solver
from phantom.validate import check_count, check_lam, check_number

ROOM = 16  # iterates at first


@dataclass
class Window:
    """The last iterates of a solve in a ring, step axis first. Room is made as steps are taken.

    Args:
        limit: most iterates to keep.
        z: (room, B, D) iterates.
        g: (room, B, D) their f(z) - z.
        gram: (B, room, room) inner products of the rows of g, in at least float32.
        reads: whether the host looks at every step for systems that have no solution.
        count: iterates seen so far.
    """

    limit: int
    z: Tensor
    g: Tensor
    gram: Tensor
    reads: bool
    count: int = 0
    _views: tuple[Any, ...] = (0,)

    def make_room(self) -> None:
        """Double the room where the next iterate finds none."""
        room = len(self.z)
        if self.count < room or room == self.limit:
            return
        more = min(room, self.limit - room)
        self.z, self.g = (torch.cat([kept, kept.new_empty(more, *kept.shape[1:])]) for kept in (self.z, self.g))
        gram, self._views = self.gram.new_zeros(len(self.gram), room + more, room + more), (0,)
        gram[:, :room, :room] = self.gram
        self.gram = gram

    def views(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return, of the first n iterates: z (B, n, D), g (B, n, D) and (B, D, n), gram (B, n, n), and its diagonal.

        Views cost as much as the arithmetic of a small state; those of a full ring serve every step.
        """
        if self._views[0] != n:
            z, g, gram = self.z[:n].transpose(0, 1), self.g[:n], self.gram[:, :n, :n]
            self._views = n, (z, g.transpose(0, 1), g.permute(1, 2, 0), gram, gram.diagonal(dim1=1, dim2=2))
        return self._views[1]


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Mix the last `memory` iterates: z <- sum_i alpha_i (z_i + lam g_i).

    alpha minimises |sum_i alpha_i g_i| subject to sum_i alpha_i = 1.

    The least-squares problem is solved by its Gram matrix, scaled to unit diagonal and ridged by `ridge`; the ridge
    is therefore relative, and works at residual 1e-8 as at 1. A problem whose system has no finite solution takes
    the damped step z + lam g. Cost: one evaluation of f and one pass over the window a step; 2 * memory * D numbers.

    With memory = max_steps and an affine f, as an adjoint equation has, it is GMRES (Walker and Ni), until that
    stagnates: its steps solve D unknowns in about D, where I - J is regular, also where f expands. Broyden's method may
    take twice as many.

    Source: Walker and Ni, *Anderson acceleration for fixed-point iterations* (2011).
    """

    memory: int = 6
    lam: float = 1.0
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("memory", self.memory, least=1)
        check_lam(self.lam)
        check_number("ridge", self.ridge, "[0, 1)", also=": it is relative to the squared residuals")

    def start(self, z: Tensor, g: Tensor) -> Window:
        limit = min(self.memory, self.max_steps)
        room = min(limit, ROOM)
        shape = (room, *z.shape)
        gram = g.new_zeros((z.shape[0], room, room))
        return Window(limit, g.new_empty(shape), g.new_empty(shape), gram, is_cheap_to_read(z))

    def propose(self, memory: Window, z: Tensor, g: Tensor) -> Tensor:
        memory.make_room()
        position = memory.count % memory.limit
        memory.z[position].copy_(z)
        memory.g[position].copy_(g)
        memory.count += 1
        n = min(memory.count, memory.limit)
        stored_z, stored_g, columns, gram, diagonal = memory.views(n)
        products = torch.bmm(g.unsqueeze(1), columns).squeeze(1)
        gram.select(1, position).copy_(products)
        gram.select(2, position).copy_(products)
        if n == 1:
            return z.add(g, alpha=self.lam)
        alpha, info = self._weights(gram, diagonal)
        row = alpha.unsqueeze(1)
        mixed = torch.baddbmm(torch.bmm(row, stored_z), row, stored_g, alpha=self.lam).squeeze(1)
        if memory.reads and not any(info.tolist()) and isfinite(alpha.sum().item()):
            return mixed
        # zero times a number that is not finite is not zero
        sound = ((alpha * 0).sum(dim=1, keepdim=True) == 0) & (info == 0).unsqueeze(1)
        return torch.where(sound, mixed, z.add(g, alpha=self.lam))

    def _weights(self, gram: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha (B, n), the minimiser of alpha^T gram alpha (ridged) with sum alpha = 1, and 0 (B,) where it is.

        solve_ex reports failure by a flag on the device instead of synchronising.
        """
        scale = diagonal.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
        column = scale.unsqueeze(2)
        scaled = gram * column * scale.unsqueeze(1)
        scaled.diagonal(dim1=1, dim2=2).add_(self.ridge)
        solution, info = torch.linalg.solve_ex(scaled, column)
        alpha = solution.squeeze(2) * scale
        return alpha / alpha.sum(dim=1, keepdim=True), info
