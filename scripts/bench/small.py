"""Small states: a solve of 8 problems of 64 numbers costs its operators and its Python, and hardly any arithmetic.

f(z) = tanh(z W^T + x) with W at 0.95 times a rotation. A solver is timed per evaluation of f, against a bare loop that
computes the residual, too, and against torchdeq's; a training step as a whole, against torchdeq's. All run in turn,
round after round, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phantom import DEQ, UPG, Anderson, Broyden, FixedPoint, Implicit, Solver, fixed_point
from scripts.bench import peer_torchdeq, ratios

STEPS, BATCH, WIDTH, RADIUS = 24, 8, 64, 0.95
TOLERANCES = (None, 1e-4)
CALLS = 4  # a round takes the time of so many


@dataclass
class Case:
    """Something to time.

    Args:
        run: does it once, and returns by how many evaluations of f its time is divided; 1 for a step.
        against: the label of what it is compared with.
        times: seconds, one entry per timed round.
    """

    label: str
    run: Callable[[], int]
    against: str | None = None
    times: list[float] = field(default_factory=list)


def take(*, clock: str, repeats: int, warmup: int, peer: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the `rows` and `ratios` of all cases."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    cases = [
        case
        for dtype in (torch.float32, torch.float64)
        for tol in TOLERANCES
        for case in _cases(dtype, tol, f"{str(dtype).removeprefix('torch.')} tol={_text(tol)}", peer=peer)
    ]
    for i in range(-warmup, repeats):
        for case in cases:
            begun = now()
            evals = sum(case.run() for _ in range(CALLS))
            if i >= 0:
                case.times.append((now() - begun) / evals)
        say(f"round {i + 1} of {repeats}" if i >= 0 else "warm-up")
    return {
        "kind": "small",
        "rows": [
            {"label": case.label, "evals": case.run(), "seconds": ratios.median_with_interval(case.times)}
            for case in cases
        ],
        "ratios": _ratios(cases),
    }


def _ratios(cases: Sequence[Case]) -> list[dict[str, Any]]:
    times = {case.label: case.times for case in cases}
    return [
        {
            "a": case.label,
            "b": case.against,
            "total": ratios.median_with_interval([a / b for a, b in zip(case.times, times[case.against], strict=True)]),
        }
        for case in cases
        if case.against is not None
    ]


def _cases(dtype: torch.dtype, tol: float | None, suffix: str, *, peer: bool) -> Iterator[Case]:
    draws = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draws, dtype=torch.float64))
    weight = (RADIUS * rotation.T).to(dtype).requires_grad_()
    x = torch.randn(BATCH, WIDTH, generator=draws, dtype=torch.float64).to(dtype).requires_grad_()
    z0 = torch.zeros(BATCH, WIDTH, dtype=dtype)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    @torch.no_grad()
    def bare() -> int:
        z = z0
        for _ in range(STEPS):
            fz = f(z)
            (fz - z).norm(dim=1) / fz.norm(dim=1)
            z = fz
        return STEPS

    yield Case(f"bare loop {suffix}", bare)
    budget = {"max_steps": STEPS, "tol": tol}
    yield Case(f"plain {suffix}", _solve(f, z0, FixedPoint(**budget)), against=f"bare loop {suffix}")
    solvers = {"anderson": Anderson(**budget), "broyden": Broyden(**budget)}
    for name, solver in solvers.items():
        theirs = f"torchdeq {name} {suffix}" if peer else None
        yield Case(f"{name} {suffix}", _solve(f, z0, solver), against=theirs)
        if theirs is not None:
            yield Case(theirs, _peer_solve(f, z0, solver, name))
        for kind, grad in {"upg k=5": UPG(k=5, lam=0.5), "implicit": Implicit(solver=solver)}.items():
            deq = DEQ(solver=solver, grad=grad)
            theirs = f"torchdeq step {kind} {name} {suffix}" if peer else None
            yield Case(
                f"step {kind} {name} {suffix}", _step(lambda f, z0, d=deq: d(f, z0).value, f, z0, (weight, x)), theirs
            )
            if theirs is not None:
                other = peer_torchdeq.counterpart(deq)
                yield Case(theirs, _step(lambda f, z0, d=other: d(f, z0)[0][-1], f, z0, (weight, x)))


def _solve(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Solver) -> Callable[[], int]:
    @torch.no_grad()
    def run() -> int:
        return fixed_point(f, z0, solver=solver).stats.num_evals

    return run


def _peer_solve(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Solver, name: str) -> Callable[[], int]:
    from torchdeq.solver import get_solver

    solve, stop = get_solver(name), peer_torchdeq.stopping(solver)

    @torch.no_grad()
    def run() -> int:
        evals = 0

        def counted(z: Tensor) -> Tensor:
            nonlocal evals
            evals += 1
            return f(z)

        solve(counted, z0, **stop)
        return evals

    return run


def _step(
    value: Callable[..., Tensor], f: Callable[[Tensor], Tensor], z0: Tensor, parameters: Sequence[Tensor]
) -> Callable[[], int]:
    def run() -> int:
        for parameter in parameters:
            parameter.grad = None
        value(f, z0).sum().backward()
        return 1

    return run


def _text(tol: float | None) -> str:
    return "null" if tol is None else f"{tol:g}"
