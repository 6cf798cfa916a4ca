"""Compare solvers and gradient estimators on a trained model: what each costs, and how near it comes.

The batch is the first of training. Solvers are compared by the relative residual of their best iterate; estimators at
the equilibrium that the run's own solver finds. The reference is implicit differentiation with a long backward solve.
Cosine and norm ratio are over all parameters before the equilibrium; the head's gradient is exact under every
estimator.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Any

import torch

from phantom import (
    NPG,
    SHINE,
    UPG,
    Anderson,
    Broyden,
    FixedPoint,
    GradientEstimator,
    Implicit,
    Solution,
    Solver,
)
from phantom.deq import deqs_of
from phantom.diagnostics import best_damping, damped_radius, ritz_values
from phantom.engine.measure.monitor import Monitor, capture
from phantom.engine.measure.timing import StepTimer
from phantom.engine.rebuild import Rebuilt
from phantom.engine.training.evaluation import batch_to
from phantom.solve import solve
from phantom.state import Packing

EXACT = Broyden(max_steps=150, tol=1e-6)
EVALUATIONS = (6, 12, 23, 45)
REPEATS = 3


def estimators(lam: float) -> dict[str, GradientEstimator]:
    """Return the estimators to compare; `lam` is the damping that the measured spectrum asks for."""
    found: dict[str, GradientEstimator] = {"one step": NPG(k=1, lam=1.0), "SHINE": SHINE()}
    for k in (3, 5, 9):
        for value in sorted({0.25, 0.5, 1.0, lam}):
            found[f"NPG k={k} lam={value:g}"] = NPG(k=k, lam=value)
            found[f"UPG k={k} lam={value:g}"] = UPG(k=k, lam=value)
    for tol in (0.3, 0.1):
        solver = FixedPoint(max_steps=40, tol=tol, lam=lam)
        found[f"NPG lam={lam:g}, k by tol={tol:g}"] = Implicit(solver=solver)
    for steps in (5, 10, 22):
        found[f"implicit, {steps} Broyden steps"] = Implicit(solver=Broyden(max_steps=steps, tol=None))
    return found


def solvers(steps: int) -> dict[str, Solver]:
    """Return the solvers to compare, with a fixed budget."""
    budget: dict[str, Any] = {"max_steps": steps, "tol": None}
    return {
        "Broyden": Broyden(**budget),
        "Anderson, memory 6": Anderson(**budget),
        **{f"fixed point, lam={lam:g}": FixedPoint(**budget, lam=lam) for lam in (1.0, 0.7, 0.5, 0.3)},
    }


def residuals(calls: list[tuple[Any, Solution]]) -> list[dict[str, Any]]:
    """Return per solver the median residual after some evaluations of f, from the initial guess of every solve."""
    rows = []
    for name, solver in solvers(max(EVALUATIONS) - 1).items():
        traces = []
        for f, out in calls:
            packing = Packing(out.z0)
            traces.append(solve(packing.wrap(f), packing.pack(out.z0), solver)[1].trace)
        best = torch.cat(traces, dim=1).nan_to_num(torch.inf).cummin(dim=0).values
        rows.append({"solver": name, "residual": {str(n): float(best[n - 1].median()) for n in EVALUATIONS}})
    return rows


def measure(run: Rebuilt, images: int) -> dict[str, Any]:
    """Return the spectrum's radii, and per estimator its cost, cosine and norm ratio, on the first training images."""
    model, task = run.model, run.task
    batch = next(iter(run.source.train(epoch=0, start=0, shard=run.shard)))[0]
    batch = batch_to(tuple(part[:images] for part in batch), run.device)
    model.train()
    deqs = deqs_of(model)
    with torch.no_grad():
        calls = capture(deqs, model, task, batch, None)
    spectrum = torch.cat([ritz_values(f, out.z_star, num_steps=40) for f, out in calls])
    lam = best_damping(spectrum)
    compared = estimators(lam)
    quality = Monitor(every=1, radius_steps=0, exact_solver=EXACT, compare=compared).measure(model, task, batch, None)
    rows = [
        {
            "estimator": name,
            **cost(run, batch, estimator),
            "cosine": quality[f"gradient_cosine/{name}"],
            "norm_ratio": quality[f"gradient_norm_ratio/{name}"],
        }
        for name, estimator in compared.items()
    ]
    reference = cost(run, batch, Implicit(solver=EXACT))
    return {
        "images": images,
        "residual": float(torch.cat([out.stats.residual for _, out in calls]).median()),
        "radius": {f"{value:g}": float(damped_radius(spectrum, value).mean()) for value in (0.25, 0.5, lam, 1.0)},
        "best_lam": lam,
        "reference": {"estimator": repr(Implicit(solver=EXACT)), **reference},
        "solvers": residuals(calls),
        "rows": rows,
    }


def cost(run: Rebuilt, batch: Any, estimator: GradientEstimator) -> dict[str, Any]:
    """Return evaluations of f with a graph, vjps, the residual of a backward solve, and the gradient part's seconds."""
    kind = "wall" if run.device.type == "cuda" else "cpu"
    timer, seconds = StepTimer(run.device, clock=kind), []
    for deq in deqs_of(run.model):
        deq.grad, deq.clock = estimator, timer.phase
    for _ in range(REPEATS):
        score = run.task.score(run.model, batch, None)
        with timer.phase("backward"):
            score.tally.loss_sum.backward()
        run.model.zero_grad()
        times = timer.take()
        seconds.append(times["attach"] + times["backward"])
    for deq in deqs_of(run.model):
        deq.clock = nullcontext
    stats = [solution.stats for solution in score.solutions]
    adjoint = [s.adjoint.residual for s in stats if s.adjoint is not None]
    return {
        "graph_evals": estimator.k if isinstance(estimator, UPG) else 1,
        "vjps": sum(s.num_vjps for s in stats),
        "adjoint_residual": float(torch.cat(adjoint).median()) if adjoint else None,
        "seconds": statistics.median(seconds),
    }
