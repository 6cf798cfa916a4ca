"""Table 2, Geng et al. 2021: time and peak memory of the gradient, against K solver steps and k phantom steps.

One model takes the trainer's own steps on one random batch. Time is that of attach and backward together (UPG evaluates
f with a graph in attach), in CPU time of this process on one thread, so that waiting for a shared machine is not
counted. Memory is the peak of all live tensors that a step makes, by a tracer of every operator: exact, and without
parameters. The forward solve is short here, as it belongs to no gradient; the peaks of whole protocols have the
budgets of the ablation instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from phantom.deq import deqs_of
from phantom.engine.measure.timing import StepTimer
from scripts.bench import measure as bench
from scripts.bench import variants
from scripts.running.measures.claims import claim, significant

# a line of the figure, its parameter, and the overrides of train.py that set it
METHODS = {
    "Implicit, Broyden": ("K", ["grad=implicit", "adjoint_solver=broyden"], "adjoint_solver.max_steps"),
    "Implicit, plain iteration": ("K", ["grad=implicit", "adjoint_solver=fixed_point"], "adjoint_solver.max_steps"),
    "BPTT": ("K", ["grad=bptt"], "grad.num_steps"),
    "UPG": ("k", ["grad=upg", "lam=0.5"], "k"),
    "NPG": ("k", ["grad=npg", "lam=0.5"], "k"),
}
FLAT = 1.02  # memory that grows by less than this over the whole range does not depend on it
LINEAR = 0.95  # r^2 of a straight line


def measure(
    *,
    model: Sequence[str],
    steps: Sequence[int],
    ks: Sequence[int],
    repeats: int,
    solver_steps: int,
    adjoint_steps: int,
    pretraining_steps: int,
    protocol_k: int,
) -> dict[str, Any]:
    """Return `rows`, one per method and step count, `fits` of straight lines, `protocols`, and `claims`.

    Args:
        model: overrides of train.py and of the benchmark: the model and its batch.
        steps, ks: what K and k take.
        repeats: timed rounds, after one that is not.
        solver_steps, adjoint_steps, pretraining_steps, protocol_k: of the whole protocols; Broyden solves both ways.
    """
    device = torch.device("cpu")
    timer = StepTimer(device, clock="cpu")
    places, rows = [], []
    for method, (parameter, overrides, key) in METHODS.items():
        for count in steps if parameter == "K" else ks:
            items = [*model, "solver=fixed_point", "solver.max_steps=1", *overrides, f"{key}={count}"]
            places.append((method, parameter, count))
            rows.append(_row(items, device))
    for row in rows:
        for deq in deqs_of(row.variant.model):
            deq.clock = timer.phase
    bench.run(rows, timer, repeats=repeats, warmup=1, say=lambda text: None)
    found = [
        {
            "method": method,
            "parameter": parameter,
            "steps": count,
            "ms": [significant(1e3 * (times["attach"] + times["backward"]), 4) for times in row.times],
            "bytes": row.facts["peak_bytes"]["total"],
            "evals": row.facts["graph_evals"],
            "vjps": row.facts["vjps"],
        }
        for (method, parameter, count), row in zip(places, rows, strict=True)
    ]
    fits = {method: fit([row for row in found if row["method"] == method]) for method in METHODS}
    budget = [*model, "solver=broyden", f"solver.max_steps={solver_steps}"]
    parts = {
        "pretraining": ["grad=bptt", f"grad.num_steps={pretraining_steps}"],
        "implicit": ["grad=implicit", "adjoint_solver=broyden", f"adjoint_solver.max_steps={adjoint_steps}"],
        "upg": ["grad=upg", f"k={protocol_k}", "lam=0.5"],
        "npg": ["grad=npg", f"k={protocol_k}", "lam=0.5"],
    }
    peaks = {name: _row([*budget, *items], device).facts["peak_bytes"]["total"] for name, items in parts.items()}
    peaks["implicit_protocol"] = max(peaks["pretraining"], peaks["implicit"])
    return {"rows": found, "fits": fits, "protocols": peaks, "claims": claims(found, fits, peaks)}


def _row(items: Sequence[str], device: torch.device) -> bench.Row:
    (setting,) = variants.settings(items)
    row = bench.Row(setting, variants.make(setting, device), "ours")
    score = row.variant.step(StepTimer(device))  # the optimiser's state is made here
    row.facts = bench.facts_of(row.variant, score, variants.work_of(row.variant, score)) | bench.trace(row.variant)
    return row


def fit(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the straight lines through median milliseconds and bytes against steps: intercepts, slopes and r^2."""
    x = [row["steps"] for row in rows]
    time, memory = line(x, [statistics.median(row["ms"]) for row in rows]), line(x, [row["bytes"] for row in rows])
    return {
        "ms": significant(time[0]),
        "ms_per_step": significant(time[1]),
        "ms_r2": significant(time[2]),
        "bytes": significant(memory[0]),
        "bytes_per_step": significant(memory[1]),
        "growth": significant(max(row["bytes"] for row in rows) / min(row["bytes"] for row in rows)),
    }


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return intercept, slope and r^2 of the least-squares line; r^2 of constant values is one."""
    slope, intercept = statistics.linear_regression(x, y)
    spread = sum((b - statistics.fmean(y)) ** 2 for b in y)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return intercept, slope, 1 - left / spread if spread else 1.0


def claims(
    rows: Sequence[Mapping[str, Any]], fits: Mapping[str, Mapping[str, float]], peaks: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the entries of Table 2, with their numbers."""
    five, ten = (next(r["bytes"] for r in rows if (r["method"], r["steps"]) == which) for which in _HALVES)
    return [
        *(
            claim(f"{method}: time is O({letter}): r^2 of a straight line", fits[method]["ms_r2"], ">", LINEAR)
            for method, (letter, _, _) in METHODS.items()
        ),
        claim("UPG: memory is O(k): most over least", fits["UPG"]["growth"], ">", FLAT),
        claim("NPG: memory is O(1): most over least", fits["NPG"]["growth"], "<", FLAT),
        claim(
            "Implicit, plain iteration: memory is O(1): most over least",
            fits["Implicit, plain iteration"]["growth"],
            "<",
            FLAT,
        ),
        claim("Implicit, Broyden: memory is O(1): most over least", fits["Implicit, Broyden"]["growth"], "<", FLAT),
        claim("a 10-step unroll takes twice the memory of a 5-step one: BPTT over UPG", ten / five, ">", 1.5),
        claim(
            "UPG does not exceed the peak of the whole protocol of implicit differentiation: its share",
            peaks["upg"] / peaks["implicit_protocol"],
            "<=",
            1,
        ),
        claim("NPG has the smallest peak: its share of UPG's", peaks["npg"] / peaks["upg"], "<", 1),
    ]


# "a 10-layer unrolling consumes double memory compared with a 5-step unrolling" (Section 3)
_HALVES = (("UPG", 5), ("BPTT", 10))
