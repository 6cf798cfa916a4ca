"""The only solver loop: stopping, counting, the best iterate, statistics; `phantom.judge` has the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phantom.host import can_ask, is_traced
from phantom.judge import Rows, Start, count, finite_or_infinite, join, observe
from phantom.precision import with_exact_products, without_autocast
from phantom.purity import pure
from phantom.ranks import any_rank
from phantom.scaling import powers_of_two, rescaled
from phantom.solution import Stats
from phantom.solver.base import Solver, compiled
from phantom.solver.rollout import Rollout
from phantom.state import FlatMap, form_of

# a state of so few numbers gains nothing by a view of it
SMALL = 4096

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
    computed_in: torch.dtype | None = None,
) -> tuple[Tensor, Stats, Any]:
    """Run `solver` on z = f(z) from `z0` and return (best iterate, statistics, the solver's memory).

    A problem is held at its best iterate, while the others go on, once its residual is `tol` or less, once it diverges,
    and once it stays within a few roundings of |f(z)|. The iterate returned is the one with the smallest residual among
    those whose |f(z) - z| does not exceed the first one; it is finite whenever `z0` is.

    Held problems are evaluated with the others. Where the residual of one that had converged rises above `tol` again,
    the problems depend on each other, and from there on they are one, which moves, and is judged, as a whole. The host
    must see that. Where it does not ask at that step, the problem moves again by itself, as one that begins where it
    woke, and no problem counts as converged unless all have.

    Args:
        f: closed map of (B, D) tensors.
        z0: (B, D) initial guess.
        fz0: f(z0) where it is known already; saves one evaluation.
        scale: (B,) what |f(z) - z| is measured by, whatever `solver.stop` says: |g| in an adjoint equation.
        in_place: f returns memory of its own at every call, which the loop may write to.
        group: name of the process group whose ranks go on until all have stopped, because f communicates.
        watch: called after every step with its number and the best iterate until then, memory of the loop.
        last: return the last iterate in the place of the best one; of a problem that has stopped it is the best one.
        computed_in: the arithmetic of f, where it is coarser than the dtype of `z0`.
    """
    if solver.max_steps == 0:
        return z0.detach(), Stats.of_no_solve(z0), None
    own = pure(f)
    f, z, num_evals = lambda z: own(z).detach(), z0.detach(), int(fz0 is None)  # f may switch grad on
    with without_autocast(z.device.type):
        if isinstance(solver, Rollout):
            return *solver.roll_out(f, z, watch), None
        fz = f(z) if fz0 is None else fz0
        start = Start(fz, z, solver, scale, computed_in)
        if not start.is_out_of_range or (power := powers_of_two(z, fz)) is None:
            del fz  # a state is large
            return _loop(f, z, solver, start, num_evals, in_place=in_place, group=group, watch=watch, last=last)
        absolute = scale is None and solver.stop == "absolute"
        if scale is not None or absolute:
            scale = power[:, 0] if scale is None else scale * power[:, 0]
        z, fz = z * power, fz * power
        scaled = None if watch is None else lambda step, best: watch(step, best / power)
        start = Start(fz, z, solver, scale, computed_in)
        f = rescaled(f, power)
        best, stats, memory = _loop(f, z, solver, start, num_evals, in_place=True, group=group, watch=scaled, last=last)
        stats.scale = None if stats.scale is None or absolute else stats.scale / power[:, 0]
        return best / power, stats, memory


def _loop(
    f: FlatMap,
    z: Tensor,
    solver: Solver,
    start: Start,
    num_evals: int,
    *,
    in_place: bool,
    group: str | None,
    watch: Watch | None,
    last: bool,
) -> tuple[Tensor, Stats, Any]:
    judged = compiled(observe) if solver.compile else observe
    propose = with_exact_products(solver.propose, z.device.type)
    in_place = in_place and not solver.compile  # a fused pass gains nothing by it
    asks, every, batch, together = start.asks, solver.sync_every or 1, z.shape[0], False
    best, memory, g, going = z.clone(), solver.start(z, start.g), start.g, start.going
    residual = finite_or_infinite(start.residual)
    rows = Rows(residual, better=torch.ones_like(start.active), active=start.active, first=start.length)
    stalled, dependent = torch.zeros_like(start.active), start.active.new_zeros(())
    trace, moved, confirmed, stopped = [start.residual], [stalled], True, False
    done = asks and not any_rank(going != 0, group, z.device)
    for step in range(1, solver.max_steps + 1):
        if done:
            break
        if together:
            z = propose(memory, z.reshape(1, -1), g.reshape(1, -1)).view_as(g)
        else:
            z = _checked(propose, memory, z, g) if step == 1 else propose(memory, z, g)
        held = start.tol is not None and (stopped or going != batch)
        if held:
            z = torch.where(rows.active.unsqueeze(1), z, best)
        moved.append(rows.active)
        before, going, improved, woken, stopped = going, None, None, 0, False  # unknown to the host
        g, length, residual, rows = judged(f(z), z, rows, start, held=held, together=together, in_place=in_place)
        trace.append(residual)
        if rows.counts is not None:
            going, improved = rows.counts
        elif asks and step % every == 0:
            going, improved, woken = count(rows, start)  # device-to-host sync
        if rows.woken is not None:
            dependent = dependent | rows.woken.any()
        if start.near_rounding is not False and going != 0 and (improved is None or improved != before):
            stop = rows.active & ~rows.better & start.is_at_floor(best, rows.residual)
            stop = stop.all().expand(batch) if together else stop
            stalled, rows.active, stopped = stalled | stop, rows.active & ~stop, True
        # where all problems have improved the best iterate needs no copy, else it keeps its memory: a state is large
        best = z if improved == batch or rows.counts is not None else replace_rows(best, z, rows.better)
        confirmed = improved is not None and improved == (batch if before is None else before)
        if woken:
            together, going = True, batch
            memory = solver.start(z.reshape(1, -1), g.reshape(1, -1))
            best, rows = join(z, best, length, residual, rows)
        if watch is not None:
            watch(step, best)
        if not asks:
            continue
        if group is None:
            done = going == 0
        elif going is not None and step % every == 0:  # at the same steps, whichever ranks know more
            done = not any_rank(going != 0, group, z.device)
    if last:  # but the best one of a problem that has stopped
        best = torch.where(rows.active[:, None], z, best)
        rows.residual = torch.where(rows.active, finite_or_infinite(residual), rows.residual)
        is_whole = bool(rows.active.all()) if start.is_on_host else going == batch and not stopped
        confirmed = confirmed or is_whole
    settled = torch.zeros_like(start.active) if start.tol is None else rows.residual <= start.tol
    settled = settled.all().expand(batch) if together else settled
    if start.tol is None and not last and start.is_on_host:
        confirmed = bool(rows.better.all())
    confirmed = confirmed or together
    if group is not None and can_ask(z, solver):
        confirmed = not any_rank(not confirmed, group, z.device)
    stats = Stats(
        num_steps=torch.stack(moved).sum(dim=0),
        num_evals=num_evals + len(trace) - 1,
        residual=rows.residual,
        converged=settled & (settled.all() | ~dependent),
        diverged=~(rows.active | settled | stalled),
        stalled=stalled,
        dependent=dependent,
        trace=torch.stack(trace),
        scale=start.scale,
        confirmed=confirmed,
        tol=solver.tol,
    )
    return best, stats, None if together else memory


def _checked(propose: Callable[..., Tensor], memory: Any, z: Tensor, g: Tensor) -> Tensor:
    """Return the first iterate that a solver proposes, which may be one of the user's own.

    Raises:
        ValueError: it is no state, or the solver has written to `z`.
    """
    counts = not is_traced(z) and not z.is_inference()
    before = z._version if counts else 0
    new = propose(memory, z, g)
    if not isinstance(new, Tensor) or (new.shape, new.dtype) != (z.shape, z.dtype):
        raise ValueError(f"a solver's propose must return the next iterate, {form_of(z)}, got {form_of(new)}")
    if counts and z._version != before:
        raise ValueError(
            "a solver's propose has written to its argument z, which is the guess of the caller now, and may be the "
            "best iterate later: return new memory, as z + g does"
        )
    return new


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
