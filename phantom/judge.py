"""How iterates are judged: which is the best one, which problems go on, diverge, wake again or are at their floor."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from phantom.residual import Norm, positive, residual_of, vector_norm
from phantom.runtime.host import can_ask, has_numbers, is_cheap_to_read, is_on_host, read
from phantom.scaling import is_out_of_range, norm_of_any_size
from phantom.solver.base import Solver

# |f(z) - z| this many times the first one counts as divergence; the official MDEQ code uses the same factor. The
# absolute length decides under either `stop`: the relative one tends to |mu - 1| / |mu| where f grows by mu a step.
DIVERGENCE = 1e6
# |f(z) - z| within so many roundings of |f(z)|, and not falling any more, is at its floor; one of a coarser arithmetic
# than the state's, as under autocast, is a large number, above which a residual may rise for a step
FLOOR, COARSE_FLOOR = 4, 1
# and a `tol` within so many of those may never be met
NEAR = 16


class Criterion:
    """What the first evaluation tells, and the rule by which iterates are judged.

    Attributes:
        g: (B, D) f(z0) - z0, of `length` (B,) and `residual` (B,), by `norm`.
        scale: (B,) what residuals are relative to, or at least where `relative`; None for absolute ones.
        tol: () that of the solver; None for a fixed budget.
        active: (B,) who goes on, and `going`, how many; None where the host does not know.
        is_on_host: whether reading a number waits for nothing.
        is_out_of_range: whether squares of these numbers overflow or vanish; False where the host does not know.
        asks: whether the host asks who goes on; where it does not, a solve runs its whole budget.
        near_rounding: whether `tol` is not far above the rounding of f(z); a tensor () where the host does not know.
        reads: whether the host looks at every step; then `lengths` and `stop_at` are the numbers of `length` and `tol`.
        floor: the rounding of f(z) relative to it, in the arithmetic of f; `rounding` is that of the state's own.
    """

    def __init__(
        self, fz: Tensor, z: Tensor, solver: Solver, scale: Tensor | None, computed_in: torch.dtype | None = None
    ) -> None:
        self.norm: Norm = solver.norm
        size = vector_norm(fz, solver.norm)
        self.relative = scale is None and solver.stop == "relative"
        scale = size if self.relative else scale
        self.scale: Any = None if scale is None else positive(scale)
        self.g, self.length, self.residual, _ = residual_of(fz, z, self.scale, norm=self.norm, relative=False)
        # a NaN compares false with everything: it is never better, never converged, and always diverged
        self.active = self.length <= torch.finfo(z.dtype).max
        self.tol: Any = None
        self.rounding = self.floor = FLOOR * torch.finfo(z.dtype).eps
        if computed_in is not None:
            self.floor = max(self.floor, COARSE_FLOOR * torch.finfo(computed_in).eps)
        self.going, self.is_out_of_range = None, False
        self.near_rounding: bool | Tensor = False
        self.is_on_host = is_on_host(z)
        self.reads = is_cheap_to_read(z) and not solver.compile
        self._limit = None if self.reads else _limit(self.length)
        if solver.tol is not None:
            self.tol = self.length.new_full((), solver.tol)
            self.active = self.active & (self.residual > self.tol)
        self.asks = solver.asks and has_numbers(z)
        if can_ask(z, solver):
            self._look(size, solver.tol)
        elif solver.tol is not None and self.relative:
            self.near_rounding = solver.tol <= NEAR * self.floor
        elif solver.tol is not None:
            divisor = 1.0 if self.scale is None else self.scale
            self.near_rounding = (self.tol * divisor <= NEAR * self.floor * size).any()

    def _look(self, size: Tensor, tol: float | None) -> None:
        scale = torch.ones_like(size) if self.scale is None else self.scale
        columns = (self.length, size, self.active, scale)
        self.lengths, sizes, active, scales = read(columns, on_host=self.is_on_host)  # device-to-host sync
        self.stop_at = -inf if tol is None else self.tol.item() if self.reads else tol
        self.is_out_of_range = is_out_of_range([*map(max, self.lengths, sizes)], self.length.dtype)
        if tol is not None:
            self.going = int(sum(active))
            near = NEAR * self.floor
            self.near_rounding = any(tol * a <= near * b for a, b in zip(scales, sizes, strict=True))

    @property
    def limit(self) -> Tensor:
        """(B,) a longer g is divergence."""
        if self._limit is None:
            self._limit = _limit(self.length)
        return self._limit

    def share_scale(self, power: Tensor) -> None:
        """Measure every problem by the scale of a mean one: by it all meet `tol` only where the whole state does.

        Args:
            power: (B,) the numbers of a problem are its own times this.
        """
        mean = norm_of_any_size((self.scale / power)[None], "max" if self.norm == "max" else "rms")
        self.scale = positive(mean * power)

    def is_at_floor(self, z: Tensor, residual: Tensor) -> Tensor:
        """Return where the residual (B,) of `z` (B, D) is not above the rounding of f(z), which is near z."""
        size = vector_norm(z, self.norm)
        scale = torch.maximum(size, self.scale) if self.relative else self.scale
        length = residual if scale is None else residual * scale
        return (length <= self.floor * size) & self.near_rounding


def finite_or_infinite(residual: Tensor) -> Tensor:
    """Return `residual` (B,), infinite where it is NaN: such a one is the worst."""
    return residual.nan_to_num(inf, inf, -inf)  # not the largest number, which ONNX has in float32 alone


def _limit(length: Tensor) -> Tensor:
    # if z0 is already a fixed point its residual is 0 and sets no scale: only inf and NaN then count as divergence
    largest = torch.finfo(length.dtype).max
    return torch.where(length > 0, length * DIVERGENCE, largest).clamp_max(largest)


@dataclass
class Status:
    """Where the problems of a solve stand, (B,) each.

    Args:
        residual: of the best iterate.
        better: whether the newest iterate is the best one.
        active: who goes on.
        first: |g| where it began, or where it woke: a longer one is no progress.
        woken: who had converged, and does not any more; None where nobody was held.
        counts: how many go on, and how many of those that did have improved, which is all of them; None where the host
            has not looked.
        seen: the numbers of `active` and `residual`, where the host has them already.
    """

    residual: Tensor
    better: Tensor
    active: Tensor
    first: Tensor
    woken: Tensor | None = None
    counts: tuple[int, int] | None = None
    seen: tuple[list[bool], list[float]] | None = None


def observe(
    fz: Tensor, z: Tensor, status: Status, criterion: Criterion, *, held: bool, together: bool, in_place: bool
) -> tuple[Tensor, Tensor, Tensor, Status]:
    """Return g = f(z) - z, its norm, the residual of z, and where the problems stand now."""
    g, length, residual, scale = residual_of(
        fz, z, criterion.scale, norm=criterion.norm, relative=criterion.relative, in_place=in_place
    )
    if together:
        return g, length, residual, _observe_together(length, residual, status, criterion)
    if criterion.reads and (expected := _as_expected(length, residual, scale, status, criterion, held)):
        return g, length, residual, expected
    # where |f(z)| grows, a relative residual falls; and there the rounding of f(z) alone moves |f(z) - z|
    shorter = length if scale is None or not criterion.relative else torch.add(length, scale, alpha=criterion.rounding)
    better, first = (residual < status.residual) & (shorter < status.first), status.first
    if criterion.tol is None:
        best, woken = torch.where(better, residual, status.residual), None
        active = status.active & (length <= criterion.limit)
    elif not held:
        best, woken = torch.where(better, residual, status.residual), None
        active = (length <= criterion.limit) & (best > criterion.tol)  # all were active
    else:
        better = better & status.active
        # a held problem was evaluated at its best iterate again: it has the same residual, if it is independent
        again = finite_or_infinite(residual)
        best = torch.where(better | ~status.active, again, status.residual)
        woken = ~status.active & (status.residual <= criterion.tol) & (best > criterion.tol)
        active = (status.active | woken) & (length <= criterion.limit) & (best > criterion.tol)
        first = torch.where(woken, torch.maximum(first, length), first)
    return g, length, residual, Status(best, better, active, first, woken)


def _as_expected(
    length: Tensor, residual: Tensor, scale: Tensor | None, status: Status, criterion: Criterion, held: bool
) -> Status | None:
    """Return where the problems stand after the usual step: those that go on improve, some converge, and no more.

    The rule of `observe` is a dozen operators on a few numbers, which costs more than reading these. None where the
    step is another one, and where rounding could decide.
    """
    on, bests = status.seen or (status.active.tolist(), status.residual.tolist())
    residuals, lengths, going = residual.tolist(), length.tolist(), 0
    margin, tol = 2 * criterion.rounding, criterion.stop_at
    scales = scale.tolist() if scale is not None and criterion.relative else [0.0] * len(on)
    known = zip(on, residuals, bests, lengths, scales, criterion.lengths, strict=True)
    for goes_on, now, best, size, divisor, first in known:
        if goes_on:
            if not (now < best and size + margin * (size + divisor) < first):
                return None
            going += now > tol
        elif not held or not (now <= tol or (tol < best and now < inf)):
            return None
    improved = sum(on)
    all_go_on = going == improved
    active = status.active if all_go_on else status.active & (residual > criterion.tol)
    seen = (on, residuals) if all_go_on else None
    return Status(residual, status.active, active, status.first, counts=(going, improved), seen=seen)


def _observe_together(length: Tensor, residual: Tensor, status: Status, criterion: Criterion) -> Status:
    """Return where the problems stand if the whole state is one: it is better, and goes on, or is not."""
    whole, first = vector_norm(torch.stack((length, criterion.length)), criterion.norm)
    better = (residual.amax() < status.residual.amax()) & (whole < first) & status.active
    # where other processes go on, a state that is held is evaluated at its best iterate again, as a row is
    again = finite_or_infinite(residual)
    best = torch.where(better | ~status.active, again, status.residual)
    woken = ~status.active & (status.residual <= criterion.tol).all() & (best > criterion.tol).any()
    going = (status.active | woken) & (whole <= _limit(first)) & (best > criterion.tol).any()
    return Status(best, better, going, status.first, woken)


def join(z: Tensor, best: Tensor, length: Tensor, residual: Tensor, status: Status) -> tuple[Tensor, Status]:
    """Return the state that was evaluated last as the best one of all problems, and all of them as active."""
    finite = length.isfinite()
    best = torch.where(finite[:, None], z, best)
    residual = torch.where(finite, residual, torch.inf)
    return best, Status(residual, status.better, torch.ones_like(status.active), status.first)


def count(status: Status, criterion: Criterion) -> tuple[int, int, int]:
    """Return how many problems go on, have improved, and have begun to move again; the host waits once."""
    known = (status.active, status.better) if status.woken is None else (status.active, status.better, status.woken)
    found = [int(sum(flags)) for flags in read(known, on_host=criterion.is_on_host)]
    return found[0], found[1], found[2] if len(found) == 3 else 0
