"""Anderson acceleration with a relative ridge and an incremental Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phantom.solver.base import Solver
from phantom.validate import check_count, check_lam, is_number


@dataclass
class Window:
    """The last n iterates of a solve in a ring, step axis first.

    Args:
        z: (memory, B, D) iterates.
        g: (memory, B, D) their f(z) - z.
        gram: (B, memory, memory) inner products of the rows of g, in at least float32.
        count: iterates seen so far.
    """

    z: Tensor
    g: Tensor
    gram: Tensor
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Mix the last `memory` iterates: z <- sum_i alpha_i (z_i + lam g_i).

    alpha minimises |sum_i alpha_i g_i| subject to sum_i alpha_i = 1.

    The least-squares problem is solved by its Gram matrix, scaled to unit diagonal and ridged by `ridge`; the ridge
    is therefore relative, and works at residual 1e-8 as at 1. A problem whose system has no finite solution takes
    the damped step z + lam g. Cost: one evaluation of f and one pass over the window a step; 2 * memory * D numbers.

    Source: Walker and Ni, *Anderson acceleration for fixed-point iterations* (2011).
    """

    memory: int = 6
    lam: float = 1.0
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("memory", self.memory, least=1)
        check_lam(self.lam)
        if not is_number(self.ridge) or not 0 <= self.ridge < 1:
            raise ValueError(f"ridge={self.ridge!r} must be in [0, 1): it is relative to the squared residuals")

    def start(self, z: Tensor, g: Tensor) -> Window:
        size = min(self.memory, self.max_steps)
        shape = (size, *z.shape)
        return Window(g.new_empty(shape), g.new_empty(shape), g.new_zeros((z.shape[0], size, size)))

    def propose(self, memory: Window, z: Tensor, g: Tensor) -> Tensor:
        size = memory.z.shape[0]
        position = memory.count % size
        memory.z[position].copy_(z)
        memory.g[position].copy_(g)
        memory.count += 1
        n = min(memory.count, size)
        products = torch.bmm(g[:, None, :], memory.g[:n].permute(1, 2, 0))[:, 0, :]
        memory.gram[:, position, :n] = products
        memory.gram[:, :n, position] = products
        damped = z.add(g, alpha=self.lam)
        if n == 1:
            return damped
        alpha = self._weights(memory.gram[:, :n, :n])
        mixed = torch.bmm(alpha[:, None, :], memory.z[:n].transpose(0, 1))
        mixed = torch.baddbmm(mixed, alpha[:, None, :], memory.g[:n].transpose(0, 1), alpha=self.lam)[:, 0, :]
        # zero times a number that is not finite is not zero
        sound = (alpha * 0).sum(dim=1, keepdim=True) == 0
        return torch.where(sound, mixed, damped)

    def _weights(self, gram: Tensor) -> Tensor:
        """Return alpha (B, n), the minimiser of alpha^T gram alpha (ridged) with sum alpha = 1."""
        scale = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
        scaled = gram * scale[:, :, None] * scale[:, None, :]
        scaled.diagonal(dim1=1, dim2=2).add_(self.ridge)
        # solve_ex reports failure by a flag on the device instead of synchronising; the caller tests finiteness
        solution, info = torch.linalg.solve_ex(scaled, scale[:, :, None])
        alpha = solution[:, :, 0] * scale
        alpha = alpha / alpha.sum(dim=1, keepdim=True)
        return torch.where((info == 0)[:, None], alpha, torch.nan)
