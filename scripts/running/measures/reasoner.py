"""The gradients of a supervision step of a recursive reasoner, by the rules that its authors chose and by others.

Puzzles are the first batch of training, in float64. After 1, 4 and 16 supervision steps: per rule, cosine and norm
ratio to the gradient through all cycles (BPTT), over all parameters before the heads; and of one cycle at the state of
eight puzzles, spectral radius and relative residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evaluate import shipped_folder
from models.official.load import load_reference
from phantom import BPTT, NPG, UPG, Broyden, GradientEstimator, Implicit, OneStep, Rollout
from phantom.deq import deqs_of
from phantom.diagnostics import cosine, norm_ratio, spectral_radius
from phantom.engine.artifacts import shipped
from phantom.engine.rebuild import begin_run
from phantom.engine.source import Shard
from phantom.state import Packing
from scripts.running.measures.claims import claim, significant
from train import CONFIGS

DRAWN = "random"  # weights as a run begins with them; every other name is that of weights that ship
EIGHT = 8  # puzzles of which the spectral radius is measured
# the rule that the others are held against, and is no other's rival
EXACT = "all cycles, BPTT"


def rules(cycles: int, implicit_steps: int) -> dict[str, tuple[GradientEstimator, int, str]]:
    """Return by name (estimator, cycles before it, what it differentiates) of a supervision step of `cycles` cycles."""
    solver = Broyden(max_steps=implicit_steps, tol=1e-8)
    return {
        "last pair (HRM)": (OneStep(), cycles - 1, "pair"),
        "last cycle (TRM, EqR)": (UPG(k=1, lam=1.0), cycles - 1, "cycle"),
        "last two cycles": (UPG(k=2, lam=1.0), cycles - 2, "cycle"),
        "NPG A(3, 0.5)": (NPG(k=3, lam=0.5), cycles - 1, "cycle"),
        "implicit": (Implicit(solver=solver), cycles - 1, "cycle"),
        EXACT: (BPTT(num_steps=cycles), cycles - 1, "cycle"),
    }


def measure(
    *, experiment: str, weights: Sequence[str], supervision_steps: Sequence[int], cycles: int, implicit_steps: int
) -> dict[str, Any]:
    """Return `rows`, one per weights and number of supervision steps, and `claims`.

    Args:
        experiment: of configs/, whose model and data these are.
        weights: `random`, or names of weights that ship.
        supervision_steps: after how many of them the gradients are compared.
        cycles: of a supervision step; at least 2.
        implicit_steps: of the solve of implicit differentiation, by Broyden's method.
    """
    rows = []
    for name in weights:
        init = [] if name == DRAWN else [f"init={shipped_folder(name) / shipped.WEIGHTS}"]
        run = begin_run([f"experiment={experiment}", "device=cpu", *init], CONFIGS, load_reference)
        inputs, labels = next(iter(run.source.train(epoch=0, start=0, shard=Shard())))[0]
        for deq in deqs_of(run.model):
            deq.on_failure = "ignore"  # where the cycle does not contract no backward has a solution: the page says so
        found = compare(run.model, inputs, labels, supervision_steps, rules(cycles, implicit_steps), cycles)
        rows += [{"weights": name, **row} for row in found]
    return {"rows": rows, "claims": claims(rows)}


def compare(
    model: Any,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    supervision_steps: Sequence[int],
    compared: Mapping[str, tuple[GradientEstimator, int, str]],
    cycles: int,
) -> list[dict[str, Any]]:
    """Return one row per number of supervision steps."""
    model = model.double().train()
    parameters = [p for name, p in model.named_parameters() if not name.startswith(("readout", "halting"))]
    state, rows = model.start_state(inputs), []

    def gradient(grad: GradientEstimator, before: int, differentiate: str) -> tuple[torch.Tensor, ...]:
        model.deq.grad, model.deq.solver, model.differentiate = grad, Rollout(max_steps=before), differentiate
        logits = model.step(inputs, state).logits
        return torch.autograd.grad(model.supervision.cell_losses(logits, labels).sum(), parameters)

    for number in range(1, max(supervision_steps) + 1):
        if number in supervision_steps:
            found = {name: gradient(*rule) for name, rule in compared.items()}
            exact = found.pop(EXACT)
            rows.append(
                {
                    "supervision_step": number,
                    "cosine": {name: significant(cosine(g, exact)) for name, g in found.items()},
                    "norm_ratio": {name: significant(norm_ratio(g, exact)) for name, g in found.items()},
                    **cycle(model, inputs[:EIGHT], tuple(part[:EIGHT] for part in state), cycles),
                }
            )
        with torch.no_grad():
            model.deq.solver = Rollout(max_steps=cycles)
            state = model.step(inputs, state).state
    return rows


def cycle(model: Any, inputs: torch.Tensor, state: tuple[torch.Tensor, ...], cycles: int) -> dict[str, float]:
    """Return mean spectral radius and relative residual of one cycle F, at the state before the last cycle."""
    f = model.bind(model.embed(inputs).detach())
    with torch.no_grad():
        for _ in range(cycles - 1):
            state = f(state)
        packing = Packing(state)
        z, fz = packing.pack(state), packing.pack(f(state))
    residual = (fz - z).norm(dim=1) / fz.norm(dim=1)
    radius = spectral_radius(f, state, num_steps=30)
    return {"spectral_radius": significant(radius.mean()), "residual": significant(residual.mean())}


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the comparison says of the start of training, and of the last supervision step of trained weights."""
    drawn = [row for row in rows if row["weights"] == DRAWN]
    last = max(row["supervision_step"] for row in rows)
    trained = [row for row in rows if row["weights"] != DRAWN and row["supervision_step"] == last]
    found = []
    if drawn:
        radius = min(row["spectral_radius"] for row in drawn)
        found.append(claim("random weights: the cycle does not contract: the least radius", radius, ">", 1))
    if trained:
        radius = max(row["spectral_radius"] for row in trained)
        least = min(row["cosine"]["implicit"] for row in trained)
        found.append(claim("trained weights, last step: the cycle contracts: its radius", radius, "<", 1))
        found.append(
            claim("trained weights, last step: implicit differentiation and all cycles agree: cosine", least, ">", 0.99)
        )
    return found
