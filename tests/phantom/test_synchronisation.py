"""A solve with a fixed budget never waits for the device; one with a tolerance, once every n steps."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from phantom.solve import solve
from tests.phantom.problems import randn
from tests.phantom.solvers import FEW_STEPS, each


class Syncs(TorchDispatchMode):
    """Count the operations that wait for the device, or upload from the host (indexing by a Python list)."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal")
    UPLOADING = ("lift_fresh", "_index_put_impl_", "index_put_", "index_put", "index")

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.uploading = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.waiting += name in self.WAITING
        self.uploading += name in self.UPLOADING
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Count the calls of `tolist`, which waits as well; on a CPU it dispatches no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.waiting += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


@each(FEW_STEPS)
def test_a_fixed_budget_never_waits_for_the_device(solver):
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
