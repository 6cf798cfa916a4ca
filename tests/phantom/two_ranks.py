"""One rank of `test_distributed.py`: python -m tests.phantom.two_ranks RANK WORLD FOLDER."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phantom import DEQ
from tests.phantom.cases import ESTIMATORS, SOLVE
from tests.phantom.problems import Regression, randn
from tests.phantom.processes import join, leave

BATCH = 8


def gradients(grad, rank: int, world: int) -> dict[str, Tensor]:
    """Return the gradients of the mean loss of the global batch, in two micro-batches, as this rank sees them."""
    model: nn.Module = Regression(DEQ(solver=SOLVE, grad=grad))
    wrapped = DistributedDataParallel(model) if world > 1 else model
    share = randn(BATCH, 3, seed=70).tensor_split(world)[rank]
    parts = share.tensor_split(2)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        with wrapped.no_sync() if world > 1 and not last else nullcontext():
            # DDP averages over ranks, hence the factor of `world`
            (world * wrapped(part).square().sum() / BATCH).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    torch.save({name: gradients(grad, rank, world) for name, grad in ESTIMATORS.items()}, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
