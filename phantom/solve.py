"""The only solver loop: stopping, counting, the best iterate, statistics; `phantom.judge` has the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phantom.judge import Criterion, Status, count, finite_or_infinite, join, observe
from phantom.runtime.host import can_ask, is_traced
from phantom.runtime.precision import with_exact_products, without_autocast
from phantom.runtime.purity import pure
from phantom.runtime.ranks import any_rank
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

    Held problems are still evaluated. If the residual of one that had converged rises above `tol` again, the problems
    are coupled: from then on they are solved and judged as one. The host must see that. If it does not look at that
    step, the problem just moves again, and no problem is reported as converged unless all have.

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
        criterion = Criterion(fz, z, solver, scale, computed_in)
        if not criterion.is_out_of_range or (power := powers_of_two(z, fz)) is None:
            del fz  # a state is large
            shared = None if scale is None else torch.ones_like(scale)
            iteration = _Iteration(f, z, solver, criterion, in_place=in_place, group=group, shared=shared)
            return iteration.run(num_evals, watch, last=last)
        absolute, shared = scale is None and solver.stop == "absolute", None if scale is None else power[:, 0]
        if scale is not None or absolute:
            scale = power[:, 0] if scale is None else scale * power[:, 0]
        z, fz = z * power, fz * power
        scaled = None if watch is None else lambda step, best: watch(step, best / power)
        criterion = Criterion(fz, z, solver, scale, computed_in)
        f = rescaled(f, power)
        iteration = _Iteration(f, z, solver, criterion, in_place=True, group=group, shared=shared)
        best, stats, memory = iteration.run(num_evals, scaled, last=last)
        stats.scale = None if stats.scale is None or absolute else stats.scale / power[:, 0]
        return best / power, stats, memory


class _Iteration:
    """A solve under way, which `run` leads to its end.

    Attributes:
        z, best: (B, D) the newest iterate and the best one; `g` is f(z) - z of the newest.
        status: where the problems stand.
        moved, trace: who moved in every step, and the residuals of every iterate.
        stalled: (B,) who stopped at the rounding of f.
        dependent: () whether a problem that was held moved because of others; `together`: from there on they are one.
        going, improved, before: how many problems go on after this step, how many of those that moved in it have
            improved, and how many these were; None where the host has not looked.
        stopped: whether this step may have stopped problems at the rounding of f, which `going` does not know.
        confirmed: whether f was evaluated at `best` as a whole.
        shared: (B,) where problems that are one share the scale that was given, which may be zero for a part of them:
            by what each was multiplied; else None.
    """

    def __init__(
        self,
        f: FlatMap,
        z: Tensor,
        solver: Solver,
        criterion: Criterion,
        *,
        in_place: bool,
        group: str | None,
        shared: Tensor | None = None,
    ) -> None:
        self.f, self.solver, self.criterion, self.group, self.shared = f, solver, criterion, group, shared
        self.propose = with_exact_products(solver.propose, z.device.type)
        self.observe = compiled(observe) if solver.compile else observe
        self.in_place = in_place and not solver.compile  # a fused pass gains nothing by it
        self.z, self.best, self.g, self.memory = z, z.clone(), criterion.g, solver.start(z, criterion.g)
        self.residual = finite_or_infinite(criterion.residual)
        better = torch.ones_like(criterion.active)
        self.status = Status(self.residual, better=better, active=criterion.active, first=criterion.length)
        self.stalled, self.dependent = torch.zeros_like(criterion.active), criterion.active.new_zeros(())
        self.trace, self.moved = [criterion.residual], [self.stalled]
        self.batch, self.every = z.shape[0], solver.sync_every or 1
        self.going, self.improved, self.before = criterion.going, None, None
        self.together, self.confirmed, self.stopped = False, True, False

    def run(self, num_evals: int, watch: Watch | None, *, last: bool) -> tuple[Tensor, Stats, Any]:
        """Iterate to the end, and return what `solve` does; `num_evals` is what f has cost before."""
        asks, done = self.criterion.asks, self.criterion.asks and self._have_all_stopped()
        for step in range(1, self.solver.max_steps + 1):
            if done:
                break
            held = self._move(first=step == 1)
            length, woken = self._judge(held, asks=asks and step % self.every == 0)
            self._stop_at_floor()
            self._keep_best()
            if woken:
                self._join(length)
            if watch is not None:
                watch(step, self.best)
            # with a group at the same steps, whichever ranks know more
            if asks and (self.group is None or step % self.every == 0):
                done = self._have_all_stopped()
        if last:
            self._take_last()
        stats = self._stats(num_evals + len(self.trace) - 1, last=last)
        return self.best, stats, None if self.together else self.memory

    def _have_all_stopped(self) -> bool:
        return not any_rank(self.going != 0, self.group, self.z.device)

    def _move(self, *, first: bool) -> bool:
        """Go to the next iterate; return whether problems are held at their best one."""
        if self.together:
            z, g = self.z.reshape(1, -1), self.g.reshape(1, -1)
            self.z = self.propose(self.memory, z, g).view_as(self.g)
        elif first:
            self.z = _checked(self.propose, self.memory, self.z, self.g)
        else:
            self.z = self.propose(self.memory, self.z, self.g)
        held = self.criterion.tol is not None and (self.stopped or self.going != self.batch)
        if held:
            self.z = torch.where(self.status.active.unsqueeze(1), self.z, self.best)
        self.moved.append(self.status.active)
        return held

    def _judge(self, held: bool, *, asks: bool) -> tuple[Tensor, int]:
        """Evaluate f and judge; return |g| (B,), and how many held problems were seen to move."""
        self.before, self.going, self.improved, woken = self.going, None, None, 0
        self.g, length, self.residual, self.status = self.observe(
            self.f(self.z),
            self.z,
            self.status,
            self.criterion,
            held=held,
            together=self.together,
            in_place=self.in_place,
        )
        self.trace.append(self.residual)
        if self.status.counts is not None:
            self.going, self.improved = self.status.counts
        elif asks:
            self.going, self.improved, woken = count(self.status, self.criterion)  # device-to-host sync
        if self.status.woken is not None:
            self.dependent = self.dependent | self.status.woken.any()
        return length, woken

    def _stop_at_floor(self) -> None:
        criterion, status = self.criterion, self.status
        all_improved = self.improved is not None and self.improved == self.before
        self.stopped = criterion.near_rounding is not False and self.going != 0 and not all_improved
        if self.stopped:
            stop = status.active & ~status.better & criterion.is_at_floor(self.best, status.residual)
            stop = stop.all().expand(self.batch) if self.together else stop
            self.stalled, status.active = self.stalled | stop, status.active & ~stop

    def _keep_best(self) -> None:
        # where all problems have improved the best iterate needs no copy, else it keeps its memory: a state is large
        whole = self.improved == self.batch or self.status.counts is not None
        self.best = self.z if whole else replace_rows(self.best, self.z, self.status.better)
        self.confirmed = self.improved == (self.batch if self.before is None else self.before)

    def _join(self, length: Tensor) -> None:
        """Go on with all problems as one."""
        self.together, self.going = True, self.batch
        self.memory = self.solver.start(self.z.reshape(1, -1), self.g.reshape(1, -1))
        if self.shared is not None:
            self.criterion.share_scale(self.shared)
            self.residual = length / self.criterion.scale
        self.best, self.status = join(self.z, self.best, length, self.residual, self.status)

    def _take_last(self) -> None:
        """Put the last iterate in the place of the best one, but of a problem that has stopped."""
        status, criterion = self.status, self.criterion
        self.best = torch.where(status.active[:, None], self.z, self.best)
        status.residual = torch.where(status.active, finite_or_infinite(self.residual), status.residual)
        whole = bool(status.active.all()) if criterion.is_on_host else self.going == self.batch and not self.stopped
        self.confirmed = self.confirmed or whole

    def _stats(self, num_evals: int, *, last: bool) -> Stats:
        criterion, status = self.criterion, self.status
        settled = torch.zeros_like(criterion.active) if criterion.tol is None else status.residual <= criterion.tol
        settled = settled.all().expand(self.batch) if self.together else settled
        confirmed = self.confirmed
        if criterion.tol is None and not last and criterion.is_on_host:
            confirmed = bool(status.better.all())
        confirmed = confirmed or self.together
        if self.group is not None and can_ask(self.z, self.solver):
            confirmed = not any_rank(not confirmed, self.group, self.z.device)
        return Stats(
            num_steps=torch.stack(self.moved).sum(dim=0),
            num_evals=num_evals,
            residual=status.residual,
            converged=settled & (settled.all() | ~self.dependent),
            diverged=~(status.active | settled | self.stalled),
            stalled=self.stalled,
            dependent=self.dependent,
            trace=torch.stack(self.trace),
            scale=criterion.scale,
            confirmed=confirmed,
            tol=self.solver.tol,
        )


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
