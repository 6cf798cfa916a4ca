"""One rank of `test_wrapped.py`: python -m tests.phantom.wrapped RANK WORLD FOLDER."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phantom import BPTT, DEQ, NPG, SHINE, UPG, Broyden, Implicit, OneStep
from tests.phantom.problems import DTYPE, randn, with_radius
from tests.phantom.processes import join, leave

DIM, BATCH = 4, 6
SOLVER, FIXED = Broyden(max_steps=60, tol=1e-12), Broyden(max_steps=5, tol=None)
GRADS = {
    **{"upg": UPG(k=3, lam=0.5), "npg": NPG(k=3, lam=0.5), "implicit": Implicit(solver=SOLVER), "shine": SHINE()},
    **{"one_step": OneStep(), "bptt": BPTT(num_steps=5)},
}
COMPILED = ("upg", "npg", "implicit")


class Cell(nn.Module):
    """f(z) = tanh(z W^T + b) + u."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(with_radius(0.6, DIM, seed=1))
        self.bias = nn.Parameter(0.1 * randn(DIM, seed=2))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.mT + self.bias) + u


class Model(nn.Module):
    """A linear encoder, the equilibrium of one cell, a linear head."""

    def __init__(self, grad) -> None:
        super().__init__()
        self.encoder, self.head = (nn.Linear(DIM, DIM, dtype=DTYPE) for _ in range(2))
        self.cell = Cell()
        # the inverse that SHINE takes from the solve depends on its steps: it needs as many for every batch
        self.deq = DEQ(solver=FIXED if isinstance(grad, SHINE) else SOLVER, grad=grad)

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x)
        return self.head(self.deq(partial(self.cell, u=u), torch.zeros_like(u)).value)


def gradients(model: nn.Module, shares: list[Tensor], *, world: int) -> list[list[Tensor]]:
    """Return the gradients of two steps of the sum over all ranks, each accumulated over the micro-batches `shares`."""
    found = []
    for _ in range(2):
        for i, x in enumerate(shares):
            waits = isinstance(model, DistributedDataParallel) and i + 1 < len(shares)
            with model.no_sync() if waits else nullcontext():
                model(x).square().sum().backward()
        found.append([world * p.grad for p in model.parameters()])  # the wrapper returns the mean over ranks
        with torch.no_grad():
            for p, g in zip(model.parameters(), found[-1], strict=True):
                p -= 0.01 * g
        model.zero_grad()
    return found


def main(rank: int, world: int, folder: Path, kind: str) -> None:
    join(rank, world, folder)
    x = randn(BATCH, DIM, seed=5)
    own = list(x.tensor_split(world)[rank].tensor_split(1 if kind == "static_graph" else 2))
    found = {}
    for name, grad in GRADS.items() if kind != "compiled" else [(name, GRADS[name]) for name in COMPILED]:
        torch.manual_seed(0)
        model = Model(grad)
        alone = copy.deepcopy(model)
        if kind == "compiled":
            model.cell.compile(dynamic=False)
        wrapped = DistributedDataParallel(
            model, static_graph=kind == "static_graph", find_unused_parameters=kind == "find_unused"
        )
        found[name] = (gradients(wrapped, own, world=world), gradients(alone, [x], world=1))
    torch.save(found, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
