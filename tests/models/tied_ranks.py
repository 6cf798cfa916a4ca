"""One rank of `test_mdeq_convolution.py`: python -m tests.models.tied_ranks RANK WORLD FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.models.test_mdeq_convolution import make, tie
from tests.phantom.processes import join, leave


def gradients(rank: int, *, tied: bool) -> dict[str, torch.Tensor]:
    """Return the mean gradients of two backward calls on this rank's images."""
    model = make()
    if tied:
        tie(model.cell)
    wrapped = DistributedDataParallel(model)
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    for part in images.split(2):
        wrapped(part)[0].square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    torch.save({name: gradients(rank, tied=name == "tied") for name in ("plain", "tied")}, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
