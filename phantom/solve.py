"""The only solver loop: stopping, counting, per-problem residuals, the best iterate, divergence, statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from phantom.precision import with_exact_products, without_autocast
from phantom.purity import pure
from phantom.ranks import any_rank
from phantom.residual import Norm, positive, residual_of, vector_norm
from phantom.scaling import (
    can_ask,
    has_numbers,
    is_on_host,
    is_out_of_range,
    is_read_for_nothing,
    powers_of_two,
    read,
    rescaled,
)
from phantom.solution import Stats
from phantom.solver.base import Solver, compiled
from phantom.state import FlatMap

# |f(z) - z| this many times the first one counts as divergence; the official MDEQ code uses the same factor. The
# absolute length decides under either `stop`: the relative one tends to |mu - 1| / |mu| where f grows by mu a step.
DIVERGENCE = 1e6
# a state of so few numbers gains nothing by a view of it
SMALL = 4096
# |f(z) - z| within so many roundings of |f(z)|, and not falling any more, is at its floor
FLOOR = 4

Watch = Callable[[int, Tensor], None]


@torch.no_grad()
def solve(
    f: FlatMap,
    z0: Tensor,
    solver: Solver,
    *,
    fz0: Tensor | None = None,
    scale: Tensor | None = None,
    in_place: bool = False,
    group: str | None = None,
    watch: Watch | None = None,
    last: bool = False,
) -> tuple[Tensor, Stats, Any]:
    """Run `solver` on z = f(z) from `z0` and return (best iterate, statistics, the solver's memory).

    A problem is held at its best iterate, while the others go on, once its residual is `tol` or less, once it diverges,
    and once it stays within a few roundings of |f(z)|. The iterate returned is the one with the smallest residual among
    those whose |f(z) - z| does not exceed the first one; it is finite whenever `z0` is.

    Held problems are evaluated with the others. Where the residual of one that had converged rises above `tol` again,
    the problems depend on each other, and from there on they are one, which moves, and is judged, as a whole.

    Args:
        f: closed map of (B, D) tensors.
        z0: (B, D) initial guess.
        fz0: f(z0) where it is known already; saves one evaluation.
        scale: (B,) what |f(z) - z| is measured by, whatever `solver.stop` says: |g| in an adjoint equation.
        in_place: f returns memory of its own at every call, which the loop may write to.
        group: name of the process group whose ranks go on until all have stopped, because f communicates.
        watch: called after every step with its number and the best iterate until then, memory of the loop.
        last: return the last iterate in the place of the best one; of a problem that has stopped it is the best one.
    """
    if solver.max_steps == 0:
        return z0.detach(), Stats.of_no_solve(z0), None
    f, z, num_evals = pure(f), z0.detach(), int(fz0 is None)
    with without_autocast(z.device.type):
        if not solver.measures_residual:
            return *solver.roll_out(f, z, watch), None
        fz = f(z) if fz0 is None else fz0
        start = _Start(fz, z, solver, scale)
        if not start.is_out_of_range or (power := powers_of_two(z, fz)) is None:
            del fz  # a state is large
            return _loop(f, z, solver, start, num_evals, in_place, group, watch, last)
        absolute = scale is None and solver.stop == "absolute"
        if scale is not None or absolute:
            scale = power[:, 0] if scale is None else scale * power[:, 0]
        z, fz = z * power, fz * power
        scaled = None if watch is None else lambda step, best: watch(step, best / power)
        best, stats, memory = _loop(
            rescaled(f, power), z, solver, _Start(fz, z, solver, scale), num_evals, True, group, scaled, last
        )
        stats.scale = None if stats.scale is None or absolute else stats.scale / power[:, 0]
        return best / power, stats, memory


class _Start:
    """What the first evaluation tells, and the rule by which iterates are judged.

    Args:
        g: (B, D) f(z0) - z0, of `length` (B,) and `residual` (B,).
        scale: (B,) what residuals are relative to, or at least where `relative`; None for absolute ones.
        active: (B,) who goes on, and `going`, how many; None where the host does not know.
        stops_early: whether the host asks who goes on; without numbers to look at, a solve runs its whole budget.
        near_rounding: whether `tol` is not far above the rounding of f(z).
        reads: whether the host looks at every step; then `lengths` and `stop_at` are the numbers of `length` and `tol`.
    """

    def __init__(self, fz: Tensor, z: Tensor, solver: Solver, scale: Tensor | None) -> None:
        self.norm: Norm = solver.norm
        size = vector_norm(fz, solver.norm)
        self.relative = scale is None and solver.stop == "relative"
        scale = size if self.relative else scale
        self.scale: Any = None if scale is None else positive(scale)
        self.g, self.length, self.residual, _ = residual_of(fz, z, self.scale, norm=self.norm, relative=False)
        # a NaN compares false with everything: it is never better, never converged, and always diverged
        self.active = self.length <= torch.finfo(z.dtype).max
        self.tol: Any = None
        self.rounding = FLOOR * torch.finfo(z.dtype).eps
        self.going, self.near_rounding, self.is_out_of_range = None, False, False
        self.is_on_host = is_on_host(z)
        self.reads = self.is_on_host and is_read_for_nothing(z) and not solver.compile
        self._limit = None if self.reads else _limit(self.length)
        if solver.tol is not None:
            self.tol = self.length.new_full((), solver.tol)
            self.active = self.active & (self.residual > self.tol)
        self.stops_early = solver.tol is not None and has_numbers(z)
        if can_ask(z, solver.tol):
            self._look(size, solver.tol)

    def _look(self, size: Tensor, tol: float | None) -> None:
        scale = torch.ones_like(size) if self.scale is None else self.scale
        columns = (self.length, size, self.active, scale)
        self.lengths, sizes, active, scales = read(columns, on_host=self.is_on_host)  # device-to-host sync
        self.stop_at = -inf if tol is None else self.tol.item() if self.reads else tol
        self.is_out_of_range = is_out_of_range([*map(max, self.lengths, sizes)], self.length.dtype)
        if tol is not None:
            self.going = int(sum(active))
            near = 16 * self.rounding
            self.near_rounding = any(tol * a <= near * b for a, b in zip(scales, sizes, strict=True))

    @property
    def limit(self) -> Tensor:
        """(B,) a longer g is divergence."""
        if self._limit is None:
            self._limit = _limit(self.length)
        return self._limit

    def is_at_floor(self, z: Tensor, residual: Tensor) -> Tensor:
        """Return where the residual (B,) of `z` (B, D) is not above the rounding of f(z), which is near z."""
        size = vector_norm(z, self.norm)
        scale = torch.maximum(size, self.scale) if self.relative else self.scale
        length = residual if scale is None else residual * scale
        return length <= self.rounding * size


def _finite_or_infinite(residual: Tensor) -> Tensor:
    """Return `residual` (B,), infinite where it is NaN: such a one is the worst."""
    return residual.nan_to_num(inf, inf, -inf)  # not the largest number, which ONNX has in float32 alone


def _limit(length: Tensor) -> Tensor:
    # a start at the fixed point itself gives no scale to grow from; neither infinity nor NaN is below the limit
    largest = torch.finfo(length.dtype).max
    return torch.where(length > 0, length * DIVERGENCE, largest).clamp_max(largest)


@dataclass
class _Rows:
    """Where the problems of a solve stand, (B,) each.

    Args:
        residual: of the best iterate.
        better: whether the newest iterate is the best one.
        active: who goes on.
        woken: who had converged, and does not any more; None where nobody was held.
        counts: how many go on, and how many of those that did have improved, which is all of them; None where the host
            has not looked.
        seen: the numbers of `active` and `residual`, where the host has them already.
    """

    residual: Tensor
    better: Tensor
    active: Tensor
    woken: Tensor | None = None
    counts: tuple[int, int] | None = None
    seen: tuple[list[bool], list[float]] | None = None


def _loop(
    f: FlatMap,
    z: Tensor,
    solver: Solver,
    start: _Start,
    num_evals: int,
    in_place: bool,
    group: str | None,
    watch: Watch | None,
    last: bool,
) -> tuple[Tensor, Stats, Any]:
    observe = compiled(_observe) if solver.compile else _observe
    propose = with_exact_products(solver.propose, z.device.type)
    in_place = in_place and not solver.compile  # a fused pass gains nothing by it
    stops_early, batch, together = start.stops_early, z.shape[0], False
    best, memory, g, going = z.clone(), solver.start(z, start.g), start.g, start.going
    residual = _finite_or_infinite(start.residual)
    rows = _Rows(residual, better=torch.ones_like(start.active), active=start.active)
    stalled = torch.zeros_like(start.active)
    trace, moved, confirmed, stopped = [start.residual], [stalled], True, False
    done = stops_early and not any_rank(going != 0, group, z.device)
    for step in range(1, solver.max_steps + 1):
        if done:
            break
        z = propose(memory, z.reshape(1, -1), g.reshape(1, -1)).view_as(g) if together else propose(memory, z, g)
        held = stops_early and (stopped or going != batch)
        if held:
            z = torch.where(rows.active.unsqueeze(1), z, best)
        moved.append(rows.active)
        before, going, improved, woken, stopped = going, None, None, 0, False  # unknown to the host
        g, length, residual, rows = observe(f(z), z, rows, start, held=held, together=together, in_place=in_place)
        trace.append(residual)
        if rows.counts is not None:
            going, improved = rows.counts
        elif stops_early and step % solver.sync_every == 0:
            going, improved, woken = _counts(rows, start)  # device-to-host sync
        if start.near_rounding and going != 0 and (improved is None or improved != before):
            stop = rows.active & ~rows.better & start.is_at_floor(best, rows.residual)
            stop = stop.all().expand(batch) if together else stop
            stalled, rows.active, stopped = stalled | stop, rows.active & ~stop, True
        # where all problems have improved the best iterate needs no copy, else it keeps its memory: a state is large
        best = z if improved == batch or rows.counts is not None else replace_rows(best, z, rows.better)
        confirmed = improved is not None and improved == (batch if before is None else before)
        if woken:
            together, going = True, batch
            memory = solver.start(z.reshape(1, -1), g.reshape(1, -1))
            best, rows = _join(z, best, length, residual, rows)
        if watch is not None:
            watch(step, best)
        if group is None:
            done = going == 0
        elif going is not None and step % solver.sync_every == 0:  # at the same steps, whichever ranks know more
            done = not any_rank(going != 0, group, z.device)
    if last:
        best, rows.residual, confirmed = z, _finite_or_infinite(residual), True
    converged = torch.zeros_like(start.active) if start.tol is None else rows.residual <= start.tol
    converged = converged.all().expand(batch) if together else converged
    if not stops_early and not last and start.is_on_host:
        confirmed = bool(rows.better.all())
    confirmed = confirmed or together
    if group is not None and can_ask(z, solver.tol):
        confirmed = not any_rank(not confirmed, group, z.device)
    stats = Stats(
        num_steps=torch.stack(moved).sum(dim=0),
        num_evals=num_evals + len(trace) - 1,
        residual=rows.residual,
        converged=converged,
        diverged=~(rows.active | converged | stalled),
        stalled=stalled,
        dependent=converged.new_full((), together),
        trace=torch.stack(trace),
        scale=start.scale,
        confirmed=confirmed,
        tol=solver.tol,
    )
    return best, stats, None if together else memory


def _observe(
    fz: Tensor, z: Tensor, rows: _Rows, start: _Start, *, held: bool, together: bool, in_place: bool
) -> tuple[Tensor, Tensor, Tensor, _Rows]:
    """Return g = f(z) - z, its norm, the residual of z, and where the problems stand now."""
    g, length, residual, scale = residual_of(
        fz, z, start.scale, norm=start.norm, relative=start.relative, in_place=in_place
    )
    if together:
        return g, length, residual, _observe_together(length, residual, rows, start)
    if start.reads and (expected := _as_expected(length, residual, scale, rows, start, held)):
        return g, length, residual, expected
    # where |f(z)| grows, a relative residual falls; and there the rounding of f(z) alone moves |f(z) - z|
    shorter = length if scale is None or not start.relative else torch.add(length, scale, alpha=start.rounding)
    better = (residual < rows.residual) & (shorter < start.length)
    if start.tol is None:
        best, active, woken = torch.where(better, residual, rows.residual), rows.active & (length <= start.limit), None
    elif not held:
        best, woken = torch.where(better, residual, rows.residual), None
        active = (length <= start.limit) & (best > start.tol)  # all were active
    else:
        better = better & rows.active
        # a held problem was evaluated at its best iterate again: it has the same residual, if it is independent
        again = _finite_or_infinite(residual)
        best = torch.where(better | ~rows.active, again, rows.residual)
        woken = ~rows.active & (rows.residual <= start.tol) & (best > start.tol)
        active = (rows.active | woken) & (length <= start.limit) & (best > start.tol)
    return g, length, residual, _Rows(best, better, active, woken)


def _as_expected(
    length: Tensor, residual: Tensor, scale: Tensor | None, rows: _Rows, start: _Start, held: bool
) -> _Rows | None:
    """Return where the problems stand after the usual step: those that go on improve, some converge, and no more.

    The rule of `_observe` is a dozen operators on a few numbers, which costs more than reading these. None where the
    step is another one, and where rounding could decide.
    """
    on, bests = rows.seen or (rows.active.tolist(), rows.residual.tolist())
    residuals, lengths, going = residual.tolist(), length.tolist(), 0
    margin, tol = 2 * start.rounding, start.stop_at
    scales = scale.tolist() if scale is not None and start.relative else [0.0] * len(on)
    known = zip(on, residuals, bests, lengths, scales, start.lengths, strict=True)
    for goes_on, now, best, size, divisor, first in known:
        if goes_on:
            if not (now < best and size + margin * (size + divisor) < first):
                return None
            going += now > tol
        elif not held or not (now <= tol or (tol < best and now < inf)):
            return None
    improved = sum(on)
    if going == improved:
        return _Rows(residual, rows.active, rows.active, counts=(going, improved), seen=(on, residuals))
    return _Rows(residual, rows.active, rows.active & (residual > start.tol), counts=(going, improved))


def _observe_together(length: Tensor, residual: Tensor, rows: _Rows, start: _Start) -> _Rows:
    """Return where the problems stand if the whole state is one: it is better, and goes on, or is not."""
    whole, first = vector_norm(torch.stack((length, start.length)), start.norm)
    better = (residual.amax() < rows.residual.amax()) & (whole < first) & rows.active
    # where other processes go on, a state that is held is evaluated at its best iterate again, as a row is
    again = torch.where(residual.isfinite(), residual, torch.inf)
    best = torch.where(better | ~rows.active, again, rows.residual)
    woken = ~rows.active & (rows.residual <= start.tol).all() & (best > start.tol).any()
    going = (rows.active | woken) & (whole <= _limit(first)) & (best > start.tol).any()
    return _Rows(best, better, going, woken)


def _join(z: Tensor, best: Tensor, length: Tensor, residual: Tensor, rows: _Rows) -> tuple[Tensor, _Rows]:
    """Return the state that was evaluated last as the best one of all problems, and all of them as active."""
    finite = length.isfinite()
    best = torch.where(finite[:, None], z, best)
    return best, _Rows(torch.where(finite, residual, torch.inf), rows.better, torch.ones_like(rows.active))


def _counts(rows: _Rows, start: _Start) -> tuple[int, int, int]:
    """Return how many problems go on, have improved, and have begun to move again; the host waits once."""
    known = (rows.active, rows.better) if rows.woken is None else (rows.active, rows.better, rows.woken)
    counts = [int(sum(flags)) for flags in read(known, on_host=start.is_on_host)]
    return counts[0], counts[1], counts[2] if len(counts) == 3 else 0


def replace_rows(kept: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """Write into `kept` (B, D) those rows of `new` (B, D) for which `rows` (B,) is true, and return it."""
    wide = [kept, new]
    plain = not torch.compiler.is_compiling() and kept.numel() > SMALL
    plain = plain and all(t.is_contiguous() and t.storage_offset() == 0 for t in wide)
    if kept.is_cpu and plain and kept.shape[1] * kept.element_size() % 16 == 0:
        # torch.where goes number by number there, and is two to three times as fast on fewer and wider ones
        wide = [t.view(torch.complex128) for t in wide]
    torch.where(rows[:, None], wide[1], wide[0], out=wide[0])
    return kept
