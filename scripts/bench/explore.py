"""Compare gradient estimators and solvers on a model: what each costs, and how near it comes.

The batches are the first of training. Estimators are compared at the equilibrium that the run's own solver finds, and
the reference is implicit differentiation with a long backward solve. Cosine and norm ratio are over all parameters
before the equilibrium; the head's gradient is exact under every estimator. They are means over the batches, costs are
those of the first one. Solvers are compared by the relative residual of their best iterate.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from phantom import Anderson, Broyden, FixedPoint, GradientEstimator, Implicit, Solution, Solver
from phantom.deq import deqs_of
from phantom.diagnostics import best_damping, damped_radius, ritz_values
from phantom.engine.config.overrides import expand
from phantom.engine.errors import ConfigError
from phantom.engine.measure.monitor import Monitor, capture
from phantom.engine.measure.timing import StepTimer
from phantom.engine.rebuild import Rebuilt
from phantom.engine.training.evaluation import batch_to
from phantom.solve import solve
from phantom.state import Packing
from scripts.bench import variants
from scripts.bench.instruments import Tracer
from scripts.bench.measure import traced

# with a memory of all its steps it is GMRES on the adjoint equation, and converges where J expands, as Broyden may not
EXACT = Anderson(max_steps=150, memory=150, tol=1e-5)
EVALUATIONS = (6, 12, 23, 45)
REPEATS = 3
# the keys of the grid; all others are those of the run
GRID = {
    "grad": "upg,npg,one_step,shine,implicit",
    "k": "1,3,5,9",
    "lam": "0.5,best,1.0",
    "adjoint_solver": "broyden",
    "adjoint_solver.max_steps": "5,10,22",
}


def split(items: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return (what is typed of the grid, all other items)."""
    roots = {key.split(".")[0] for key in GRID}
    mine = [item for item in items if item.split("=")[0].split(".")[0] in roots]
    return dict(item.split("=", 1) for item in mine), [item for item in items if item not in mine]


def estimators(grid: dict[str, str], lam: float, solver: Solver) -> dict[str, GradientEstimator]:
    """Return the estimators of a grid by the overrides that choose them, each once.

    Args:
        lam: what `lam=best` stands for.
        solver: of the forward solve; SHINE needs Broyden there, and is left out of the grid's default otherwise.

    Raises:
        ConfigError: an unknown leaf or key, or an impossible value.
    """
    typed = {key: value.replace("best", str(float(f"{lam:g}"))) for key, value in (GRID | grid).items()}
    found: dict[str, dict[str, str]] = {}
    for job in expand([f"{key}={value}" for key, value in typed.items()]):
        overrides = variants.used(dict(item.split("=", 1) for item in job))
        found.setdefault(" ".join(f"{key}={value}" for key, value in overrides.items()), overrides)
    if not isinstance(solver, Broyden) and "grad=shine" in found:
        if "grad" in grid:
            raise ConfigError("grad=shine reuses the steps of the forward solve: it needs a run with solver=broyden")
        del found["grad=shine"]
    return {name: variants.plan(overrides).deq.grad for name, overrides in found.items()}


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


def measure(run: Rebuilt, grid: dict[str, str], batches: int) -> dict[str, Any]:
    """Return the spectrum's radii, the solvers' residuals, and per estimator its cost, cosine and norm ratio.

    Raises:
        ConfigError: the grid names what does not exist.
    """
    model, task = run.model, run.task
    steps = islice(run.source.train(epoch=0, start=0, shard=run.shard), batches)
    data = [batch_to(micro[0], run.device) for micro in steps]
    model.train()
    with torch.no_grad():
        calls = capture(model, task, data[0], None)
    spectrum = torch.cat([ritz_values(f, out.z_star, num_steps=40) for f, out in calls])
    lam = best_damping(spectrum)
    compared = estimators(grid, lam, run.plan.deq.solver)
    monitor = Monitor(every=1, radius_steps=0, exact_solver=EXACT, compare=compared)
    qualities = [monitor.measure(model, task, batch, None) for batch in data]
    costs = cost(run, data[0], {**compared, "": Implicit(solver=EXACT)})

    def mean(name: str) -> float:
        return statistics.fmean(quality[name] for quality in qualities)

    batch = "batch" if len(data) == 1 else "batches"
    return {
        "examples": f"{len(data)} training {batch} of {costs[''].pop('items')} {task.unit}",
        "residual": float(torch.cat([out.stats.residual for _, out in calls]).median()),
        "radius": {f"{value:g}": float(damped_radius(spectrum, value).mean()) for value in (0.25, 0.5, lam, 1.0)},
        "best_lam": lam,
        "reference": {
            "estimator": repr(Implicit(solver=EXACT)),
            "residual": mean("exact_residual"),
            "unsolved": mean("exact_unsolved"),
            **costs.pop(""),
        },
        "solvers": residuals(calls),
        "rows": [
            {
                "estimator": name,
                **{key: value for key, value in costs[name].items() if key != "items"},
                "cosine": mean(f"gradient_cosine/{name}"),
                "norm_ratio": mean(f"gradient_norm_ratio/{name}"),
            }
            for name in compared
        ],
    }


def cost(run: Rebuilt, batch: Any, compared: dict[str, GradientEstimator]) -> dict[str, dict[str, Any]]:
    """Return what the gradient of each estimator costs, timed in turn: the median of some rounds.

    `graph_evals` counts evaluations of f with a graph, `vjps` the estimator's own; `bytes` is the peak of the tensors
    that the step has made and still holds, from the end of the solve on; `seconds` are those of attach and backward.
    """
    deqs = deqs_of(run.model)
    timer = StepTimer(run.device, clock="wall" if run.device.type == "cuda" else "cpu")
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    found: dict[str, dict[str, Any]] = {}
    kept = [deq.grad for deq in deqs]

    def step(clock: StepTimer | Tracer) -> Any:
        score = run.task.score(run.model, batch, None)
        with clock.phase("backward"):
            score.tally.loss_sum.backward()
        run.model.zero_grad()
        return score

    for turn in range(1 + REPEATS):
        for name, estimator in compared.items():
            for deq in deqs:
                deq.grad, deq.clock = estimator, timer.phase
            if turn == 0:
                tracer, score = traced(run.model, step)
                found[name] = {**_counts(score), "graph_evals": tracer.evals["attach"], "bytes": tracer.peak_gradient}
                continue
            step(timer)
            times = timer.take()
            seconds[name].append(times["attach"] + times["backward"])
    for deq, grad in zip(deqs, kept, strict=True):
        deq.grad, deq.clock = grad, nullcontext
    return {name: {**row, "seconds": statistics.median(seconds[name])} for name, row in found.items()}


def _counts(score: Any) -> dict[str, Any]:
    stats = [solution.stats for solution in score.solutions]
    adjoint = [s.adjoint.residual for s in stats if s.adjoint is not None]
    return {
        "items": score.tally.count,
        "vjps": sum(s.num_vjps for s in stats),
        "adjoint_residual": float(torch.cat(adjoint).median()) if adjoint else None,
    }
