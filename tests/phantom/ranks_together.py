"""One rank of `test_ranks_together.py`: python -m tests.phantom.ranks_together RANK WORLD FOLDER."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from phantom import DEQ, NPG, UPG, Anderson, Broyden, FixedPoint, Implicit
from tests.phantom.problems import DTYPE, randn, with_radius
from tests.phantom.processes import join, leave

BATCH, DIM = 6, 4
TOL = 1e-12
SOLVERS = {
    "plain": FixedPoint(max_steps=600, tol=TOL),
    "broyden": Broyden(max_steps=200, tol=TOL),
    "plain_never_asked": FixedPoint(max_steps=600, tol=TOL, sync_every=None),
    "anderson_rarely_asked": Anderson(max_steps=300, tol=TOL, sync_every=3),
}
GRADS = {
    "upg": UPG(k=3, lam=0.5),
    "npg": NPG(k=3, lam=0.5),
    "implicit": Implicit(solver=Broyden(max_steps=200, tol=TOL)),
    "implicit_plain": Implicit(solver=FixedPoint(max_steps=400, tol=TOL)),
}
# Broyden's secants are those of a rank, and of little use where another one moves the map
CASES = [
    *itertools.product(("alone", "sharded"), SOLVERS, ("upg", "npg", "implicit")),
    *itertools.product(("mean", "batch_norm"), ("plain", "anderson_rarely_asked"), ("upg", "npg", "implicit_plain")),
    ("batch_norm", "plain", "implicit"),
    ("mean", "plain_never_asked", "npg"),
]


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; its backward sums the cotangents, which every rank has its own of."""

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        t = t.clone()
        if dist.is_initialized():
            dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return SumOverRanks.apply(g)


class Cell(nn.Module):
    """f(z) = slope tanh(z W^T + x), where the last rows have the largest slope, and so need the most steps.

    Args:
        kind: "mean" adds half of the mean of z over all rows of all ranks, "batch_norm" normalises by their statistics.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(with_radius(0.9, DIM, seed=1))

    def forward(self, z: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        inner = z @ self.weight.T + x
        if self.kind == "mean":
            inner = inner + 0.5 * SumOverRanks.apply(z.sum(dim=0)) / BATCH
        if self.kind == "batch_norm":
            inner = inner - SumOverRanks.apply(inner.sum(dim=0)) / BATCH
            inner = inner * (SumOverRanks.apply(inner.square().sum(dim=0)) / BATCH + 1.0).rsqrt()
        return slope * torch.tanh(inner)


def outcome(kind: str, solver: str, grad: str, rank: int, world: int) -> dict[str, Any]:
    """Return this rank's part of the equilibrium of the global batch, and the gradients of its mean loss."""
    rows = torch.arange(BATCH).tensor_split(world)[rank]
    x = randn(BATCH, DIM, seed=2)[rows].requires_grad_()
    slope = torch.linspace(0.02, 0.9, BATCH, dtype=DTYPE)[rows, None]
    cell = Cell(kind)
    if kind == "sharded" and world > 1:
        fully_shard(cell)
    deq = DEQ(solver=SOLVERS[solver], grad=GRADS[grad], group="world" if solver == "plain" else dist.group.WORLD)
    deq = copy.deepcopy(deq)
    solution = deq(lambda z: cell(z, x, slope), torch.zeros(len(rows), DIM, dtype=DTYPE))
    pickle.dumps(solution.stats)
    loss = (solution.value.square() * randn(BATCH, DIM, seed=3)[rows]).sum()
    loss.backward()
    weight: Any = cell.weight.grad
    if kind == "sharded" and world > 1:
        weight = world * weight.full_tensor()  # which it averages
    elif world > 1:
        dist.all_reduce(weight)
    with torch.no_grad():
        again = deq(lambda z: cell(z, x, slope), torch.zeros(len(rows), DIM, dtype=DTYPE))
    adjoint = solution.stats.adjoint
    return {
        "value": solution.value.detach(),
        "no_grad": again.value,
        "x": x.grad,
        "weight": weight,
        "evals": (solution.stats.num_evals, again.stats.num_evals, adjoint and adjoint.num_evals),
        "steps": int(solution.stats.num_steps.max()),
        "converged": bool(solution.stats.converged.all() and again.stats.converged.all()),
    }


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    torch.save({case: outcome(*case, rank, world) for case in CASES}, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
