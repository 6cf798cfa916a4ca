"""The residual of a state as it is returned, put together from the best iterates of its problems."""

from __future__ import annotations

import torch
from torch import Tensor

from phantom.judge import finite_or_infinite
from phantom.residual import residual_of, vector_norm
from phantom.runtime.host import is_on_host
from phantom.runtime.precision import without_autocast
from phantom.scaling import powers_of_two
from phantom.solution import Stats
from phantom.solver.base import Solver
from phantom.state import FlatMap

# residuals that differ by more than a factor of two, and by more than so many roundings, are not the same
ROUNDINGS = 64


class Confirming:
    """Call f, and take the residual of its first argument, the returned state, from what it gives.

    Args:
        stats: of the solve; `residual`, `converged`, `dependent` and `confirmed` become those of the returned state.
        relative: whether |f(z)| belongs to what the residual is relative to; as `solver` says by default.
    """

    def __init__(self, f: FlatMap, stats: Stats, solver: Solver, *, relative: bool | None = None) -> None:
        self.f, self._stats, self._solver = f, stats, solver
        self._relative = solver.stop == "relative" if relative is None else relative
        self.frozen: FlatMap | None = getattr(f, "frozen", None)

    def __call__(self, z: Tensor) -> Tensor:
        fz = self.f(z)
        if not self._stats.confirmed:
            self._stats.confirmed = True
            with torch.no_grad(), without_autocast(z.device.type):
                self._confirm(fz.detach(), z.detach())
        return fz

    def _confirm(self, fz: Tensor, z: Tensor) -> None:
        stats, norm, tol, relative = self._stats, self._solver.norm, self._solver.tol, self._relative
        scale, power = stats.scale, powers_of_two(z, fz) if is_on_host(z) else None
        if power is not None:
            fz, z, scale = fz * power, z * power, (power[:, 0] if scale is None else scale * power[:, 0])
        _, _, residual, _ = residual_of(fz, z, scale, norm=norm, relative=relative)
        residual = finite_or_infinite(residual)
        info = torch.finfo(z.dtype)
        size = torch.ones_like(residual) if relative else vector_norm(fz, norm) / (1.0 if scale is None else scale)
        # relative to a cotangent of zero the size is infinite, too
        rounding = ROUNDINGS * info.eps * size.clamp_max(info.max)
        differs = (residual > 2 * stats.residual + rounding).any()
        stats.dependent = stats.dependent | differs
        stats.residual = residual
        if tol is not None:
            converged = residual <= tol
            stats.converged = converged & (converged.all() | ~stats.dependent)
