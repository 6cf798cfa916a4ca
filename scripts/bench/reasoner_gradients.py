"""Compare the gradients of a supervision step of a recursive reasoner, at the weights of one or several runs.

    python train.py experiment=reasoners/sudoku4_upg                # trained weights
    python train.py experiment=reasoners/sudoku4_upg steps=1        # as good as random ones
    python -m scripts.bench.reasoner_gradients <run folder> ...

Prints JSON. Puzzles are the first batch of training, in float64. After 1, 4 and 16 supervision steps of three cycles
each: per gradient, cosine and norm ratio to the one through all cycles (BPTT), over all parameters before the heads;
and of one cycle at the state of eight puzzles, spectral radius and relative residual.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from phantom import BPTT, NPG, UPG, Broyden, GradientEstimator, Implicit, OneStep, Rollout
from phantom.diagnostics import cosine, norm_ratio, spectral_radius
from phantom.engine.rebuild import rebuild_run
from phantom.engine.source import Shard
from phantom.state import Packing
from train import CONFIGS

CYCLES = 3
STEPS = (1, 4, 16)
# estimator, cycles before it, what it differentiates
RULES: dict[str, tuple[GradientEstimator, int, str]] = {
    "last pair (HRM)": (OneStep(), CYCLES - 1, "pair"),
    "last cycle (TRM, EqR)": (UPG(k=1, lam=1.0), CYCLES - 1, "cycle"),
    "last two cycles": (UPG(k=2, lam=1.0), CYCLES - 2, "cycle"),
    "NPG A(3, 0.5)": (NPG(k=3, lam=0.5), CYCLES - 1, "cycle"),
    "implicit, 60 Broyden steps": (Implicit(solver=Broyden(max_steps=60, tol=1e-8)), CYCLES - 1, "cycle"),
}
EXACT = (BPTT(num_steps=CYCLES), CYCLES - 1, "cycle")


def measure(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Return one row per number of supervision steps in `STEPS`."""
    model = model.double().train()
    parameters = [p for name, p in model.named_parameters() if not name.startswith(("readout", "halting"))]
    state, rows = model.start_state(inputs), []

    def gradient(grad: GradientEstimator, cycles: int, differentiate: str) -> tuple[torch.Tensor, ...]:
        model.deq.grad, model.deq.solver, model.differentiate = grad, Rollout(max_steps=cycles), differentiate
        logits = model.step(inputs, state).logits
        return torch.autograd.grad(model.supervision.cell_losses(logits, labels).sum(), parameters)

    for number in range(1, max(STEPS) + 1):
        if number in STEPS:
            exact = gradient(*EXACT)
            found = {name: gradient(*rule) for name, rule in RULES.items()}
            rows.append(
                {
                    "supervision_step": number,
                    "cosine": {name: float(cosine(g, exact)) for name, g in found.items()},
                    "norm_ratio": {name: float(norm_ratio(g, exact)) for name, g in found.items()},
                    **cycle(model, inputs[:8], tuple(part[:8] for part in state)),
                }
            )
        with torch.no_grad():
            model.deq.solver = Rollout(max_steps=CYCLES)
            state = model.step(inputs, state).state
    return rows


def cycle(model: Any, inputs: torch.Tensor, state: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Return mean spectral radius and relative residual of one cycle F, at the state before the last cycle."""
    f = model.bind(model.embed(inputs).detach())
    with torch.no_grad():
        for _ in range(CYCLES - 1):
            state = f(state)
        packing = Packing(state)
        z, fz = packing.pack(state), packing.pack(f(state))
    residual = (fz - z).norm(dim=1) / fz.norm(dim=1)
    radius = spectral_radius(f, state, num_steps=30)
    return {"spectral_radius": float(radius.mean()), "residual": float(residual.mean())}


def main(folders: list[str]) -> None:
    """Print the rows of every run, by the number of steps that it was trained."""
    found = {}
    for folder in folders:
        run = rebuild_run(Path(folder), which="last", overrides=[], configs=CONFIGS)
        inputs, labels = next(iter(run.source.train(epoch=0, start=0, shard=Shard())))[0]
        found[run.about["step"]] = measure(run.model, inputs, labels)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
