"""A solve with a fixed budget never waits for the device; one with a tolerance, once every n steps, or never."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from phantom.solve import solve
from tests.phantom.problems import randn
from tests.phantom.solvers import FEW_STEPS, each
from tests.phantom.syncs import Lists, Syncs

NEVER_ASKED = {
    f"{name}_{stop}": replace(solver, tol=1e-3, sync_every=None, stop=stop)
    for name, solver in FEW_STEPS.items()
    for stop in ("relative", "absolute")
}


@each(FEW_STEPS | NEVER_ASKED)
def test_a_solve_that_never_asks_never_waits_for_the_device(solver):
    """On tensors of a GPU that have no values, reading one raises; no GPU is needed for that."""
    with FakeTensorMode(), Syncs() as syncs, Lists() as lists:
        x = torch.zeros(2, 5, device="cuda")
        z, stats, _ = solve(lambda z: 0.5 * z + x, torch.zeros_like(x), solver)
    assert z.device.type == "cuda" and stats.num_evals == 8
    assert syncs.waiting == lists.waiting == 0 and syncs.uploading == 0


@each(FEW_STEPS)
@pytest.mark.parametrize("every", [1, 3])
def test_a_tolerance_waits_at_the_start_and_once_every_n_steps(solver, every):
    x = randn(2, 5, seed=3)
    solver = type(solver)(**{**vars(solver), "tol": 0.0, "max_steps": 12, "sync_every": every})
    with Syncs() as syncs, Lists() as lists:
        _, stats, _ = solve(lambda z: torch.cos(z) + x, torch.zeros_like(x), solver)
    assert stats.num_evals == 13, "the solve must not stop early for the count to be right"
    assert 0 < syncs.waiting + lists.waiting <= 1 + 12 // every and syncs.uploading == 0


def test_the_counter_counts():
    x = torch.ones(3)
    with Syncs() as syncs, Lists() as lists:
        bool(x.any())
        x.tolist()
        x[[0, 1]] = 2.0
    assert syncs.waiting == lists.waiting == 1 and syncs.uploading > 0
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(3, device="cuda").any())
