"""The only solver loop: stopping, counting, per-problem residuals, the best iterate, divergence, statistics."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from phantom.residual import Norm, Stop, residual_of
from phantom.solution import Stats
from phantom.solver.base import Solver, compiled
from phantom.state import FlatMap

# |f(z) - z| this many times the first one counts as divergence; the official MDEQ code uses the same factor. The
# absolute length decides under either `stop`: the relative one tends to |mu - 1| / |mu| where f grows by mu a step.
DIVERGENCE = 1e6


@torch.no_grad()
def solve(
    f: FlatMap, z0: Tensor, solver: Solver, *, fz0: Tensor | None = None, in_place: bool = False
) -> tuple[Tensor, Stats, Any]:
    """Run `solver` on z = f(z) from `z0` and return (best iterate, statistics, the solver's memory).

    A problem whose residual falls below `tol`, or diverges, is held at its best iterate while the others go on. The
    iterate returned is the one with the smallest residual visited; it is finite whenever `z0` is.

    Args:
        f: closed map of (B, D) tensors.
        z0: (B, D) initial guess.
        fz0: f(z0) where it is known already; saves one evaluation.
        in_place: f returns memory of its own at every call, which the loop may write to.
    """
    if solver.max_steps == 0:
        return z0.detach(), Stats.of_no_solve(z0), None
    with torch.autocast(z0.device.type, enabled=False):
        if not solver.measures_residual:
            return *solver.roll_out(f, z0.detach()), None
        return _loop(f, z0.detach(), solver, fz0, in_place)


def _loop(f: FlatMap, z: Tensor, solver: Solver, fz0: Tensor | None, in_place: bool) -> tuple[Tensor, Stats, Any]:
    stops_early = solver.tol is not None
    observe = partial(
        compiled(_observe) if solver.compile else _observe,
        norm=solver.norm,
        stop=solver.stop,
        tol=solver.tol,
        in_place=in_place and not solver.compile,  # a fused pass gains nothing by it
    )
    fz = f(z) if fz0 is None else fz0
    num_evals = int(fz0 is None)
    g, length, residual = residual_of(fz, z, norm=solver.norm, stop=solver.stop)
    del fz  # a state is large
    trace = [residual]
    # a NaN compares false with everything: it is never better, never converged, and always diverged
    best, best_residual = z.clone(), torch.where(residual.isfinite(), residual, torch.inf)
    # a start at the fixed point itself gives no scale to grow from; neither infinity nor NaN is below the limit
    largest = torch.finfo(length.dtype).max
    limit = torch.where(length > 0, length * DIVERGENCE, largest).clamp_max(largest)
    active = length <= limit
    batch, going = len(active), None
    if stops_early:
        active = active & ~(best_residual < solver.tol)
        going = int(active.sum())  # device-to-host sync
    moved = [torch.zeros_like(active)]
    memory = solver.start(z, g)
    for step in range(1, solver.max_steps + 1):
        if going == 0:
            break
        z = _propose(solver, memory, z, g)
        moved.append(active)
        if stops_early and going != batch:
            z = torch.where(active[:, None], z, best)
        g, residual, better, best_residual, active = observe(f(z), z, best_residual, active, limit)
        going = improved = None  # unknown to the host
        if stops_early and step % solver.sync_every == 0:
            going, improved = _counts(active, better)  # device-to-host sync
        # where all problems have improved the best iterate needs no copy, else it keeps its memory: a state is large
        best = z if improved == batch else replace_rows(best, z, better)
        num_evals += 1
        trace.append(residual)
    tol = 0.0 if solver.tol is None else solver.tol
    converged = best_residual < tol
    stats = Stats(
        num_steps=torch.stack(moved).sum(dim=0),
        num_evals=num_evals,
        residual=best_residual,
        converged=converged,
        diverged=~(active | converged),
        trace=torch.stack(trace),
    )
    return best, stats, memory


def _observe(
    fz: Tensor,
    z: Tensor,
    best_residual: Tensor,
    active: Tensor,
    limit: Tensor,
    *,
    norm: Norm,
    stop: Stop,
    tol: float | None,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return g = f(z) - z and, as (B,): the residual, whether it is the best yet, the best one, and who goes on."""
    g, length, residual = residual_of(fz, z, norm=norm, stop=stop, in_place=in_place)
    better = residual < best_residual if tol is None else (residual < best_residual) & active
    best_residual = torch.where(better, residual, best_residual)
    active = active & (length <= limit)
    if tol is not None:
        active = active & (best_residual >= tol)
    return g, residual, better, best_residual, active


def _counts(active: Tensor, better: Tensor) -> tuple[int, int]:
    """Return how many problems go on, and how many have improved; the host waits once."""
    going, improved = torch.stack((active, better)).tolist()
    return sum(going), sum(improved)


def replace_rows(kept: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """Write into `kept` (B, D) those rows of `new` (B, D) for which `rows` (B,) is true, and return it."""
    wide = [kept, new]
    plain = all(t.is_contiguous() and t.storage_offset() == 0 for t in wide)
    if kept.device.type == "cpu" and plain and kept.shape[1] * kept.element_size() % 16 == 0:
        # torch.where goes number by number there, and is two to three times as fast on fewer and wider ones
        wide = [t.view(torch.complex128) for t in wide]
    torch.where(rows[:, None], wide[1], wide[0], out=wide[0])
    return kept


def _propose(solver: Solver, memory: Any, z: Tensor, g: Tensor) -> Tensor:
    """Keep TF32 and bfloat16 shortcuts out of a solver's own matrix products; f keeps what the user has set."""
    backend = torch.backends.cuda.matmul if z.device.type == "cuda" else torch.backends.mkldnn.matmul
    kept = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        return solver.propose(memory, z, g)
    finally:
        backend.fp32_precision = kept
