"""What a solve did, in a sentence, and the one policy for solves that fail, forward and backward."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from phantom.solution import Solution, Stats

Policy = Literal["useless", "ignore", "warn", "raise"]
CHOICES = get_args(Policy)
# what to do about a failed solve; a function is called with the statistics
OnFailure = Policy | Callable[[Stats], None]
# what has failed, in the sentence about it
SOLVE, ADJOINT = "the solve of z = f(z)", "the adjoint solve of u = J^T u + g"
# the files of phantom and of torch
INSIDE = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))
COUPLED = (
    "the residual of some problems changed with the state of others: they are one problem, as the nodes of one graph "
    "are, and want z0[None], one leading axis; or f"
)


class SolveWarning(UserWarning):
    """A solve failed; the message says how, and what to try."""


class SolveError(RuntimeError):
    """A solve failed, and `on_failure="raise"`."""


_said: set[tuple[str, bool]] = set()


def check_on_failure(value: object) -> None:
    """Raise unless `value` is a policy."""
    if not callable(value) and value not in CHOICES:
        raise ValueError(
            f"on_failure={value!r} is not known; choose one of {', '.join(CHOICES)}, or a function of Stats"
        )


def describe(stats: Stats | Solution, *, of: str = "solve") -> str:
    """Return in words what happened: how many problems converged, what the others did, and what to try.

    Waits for the device.

    Args:
        stats: of a solve, or its Solution.
        of: what was solved, to begin with.
    """
    if isinstance(stats, Solution):
        stats = stats.stats
    batch, steps = len(stats.residual), int(stats.num_steps.max()) if len(stats.residual) else 0
    if len(stats.trace) == 0:
        return f"{of}: {steps} steps, no residual was measured"
    converged, diverged, stalled = (int(flags.sum()) for flags in (stats.converged, stats.diverged, stats.stalled))
    budget = stats.tol is None
    aim = "a fixed budget" if budget else f"tol={stats.tol:g}"
    worst = f"largest residual {float(stats.residual.max()):.2g} after {steps} steps ({aim})" if batch else aim
    parts = [f"{of}: {worst}"] if budget else [f"{of}: {converged} of {batch} problems converged, {worst}"]
    if bool(stats.dependent):
        parts.append(
            ("f gave another value than before: it" if batch == 1 else COUPLED)
            + " draws random numbers, as dropout does, or moves a buffer: ask phantom.check(f, z0)"
        )
    if diverged:
        parts.append(
            f"{diverged} diverged, and are returned at their best iterate: f expands, or its numbers overflow; "
            "try Broyden, a smaller lam, or a contractive f (WeightNorm, JacobianRegularizer)"
        )
    if stalled:
        name = str(stats.computed_in or stats.residual.dtype).removeprefix("torch.")
        way = "solve in float64" if stats.computed_in is None else "let f compute in float32"
        parts.append(f"{stalled} stopped at the rounding of {name}, which cannot meet tol: raise it, or {way}")
    if not budget and batch - converged - diverged - stalled:
        parts.append(
            f"{batch - converged - diverged - stalled} ran out of steps: raise max_steps or tol, or try another solver"
        )
    return "; ".join(parts)


def is_useless(stats: Stats) -> bool:
    """Return whether no problem came closer than its start, or problems that depend on each other did not converge.

    Waits for the device.
    """
    judged = _judged(stats)
    if stats.trace.shape[0] == 0 or not bool(judged.any()):
        return False
    # a fixed budget promises nothing, so that only what diverged has missed something there
    missed = _missed(stats)
    if not bool((missed | ~judged).all() | stats.dependent):
        return False
    stuck = (stats.residual >= stats.trace[0].nan_to_num(torch.inf, torch.inf)) & missed
    stuck = (stuck & ~stats.stalled | ~judged).all()  # a start at the rounding of f is an answer
    return bool(stuck | (stats.dependent & ~stats.converged.all()))


def has_failed(stats: Stats) -> bool:
    """Return whether some problem did not meet `tol`, or diverged. Waits for the device."""
    return len(stats.trace) > 0 and bool(_missed(stats).any())


def _missed(stats: Stats) -> Tensor:
    return (stats.diverged if stats.tol is None else ~stats.converged) & _judged(stats)


def _judged(stats: Stats) -> Tensor:
    """Return which problems can fail: a cotangent that is not finite, as a gradient scaler's first ones, cannot."""
    if stats.fallback is None or len(stats.trace) == 0:
        return torch.ones_like(stats.converged)
    return stats.trace[0].isfinite()


def act_where_nobody_did(stats: Stats) -> None:
    """Act on a solve, and on its backward, that did not wait for the device, by the policy that they were given.

    Call it where the host waits anyway.

    Raises:
        SolveError: see `act`.
    """
    for found, of in ((stats, SOLVE), (stats.adjoint, ADJOINT)):
        if found is not None and found.trace.shape[0] > 0 and not found.acted:
            act(found, stats.on_failure, of=of)


def act(stats: Stats, on_failure: OnFailure, *, of: str = "solve") -> None:
    """Warn, raise or call back where a solve has failed, as `on_failure` says. Waits for the device.

    "useless", the default, warns once in a process of solves whose outcome is not an answer at all; a residual that is
    merely above `tol` is left to the statistics. "warn" and "raise" speak of every problem that did not meet `tol`.

    Raises:
        SolveError: the solve has failed, and `on_failure="raise"`.
    """
    stats.acted = True
    if on_failure == "ignore" or not (is_useless(stats) if on_failure == "useless" else has_failed(stats)):
        return
    if callable(on_failure):
        on_failure(stats)
    elif on_failure == "raise":
        raise SolveError(describe(stats, of=of))
    elif on_failure == "warn" or (of, bool(stats.dependent)) not in _said:
        if on_failure != "warn":
            _said.add((of, bool(stats.dependent)))
        warnings.warn(describe(stats, of=of), SolveWarning, stacklevel=_stacklevel())


def _stacklevel() -> int:
    """Return the stacklevel of the first caller outside of phantom and torch, which is the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_code.co_filename.startswith(INSIDE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level
