"""Ranks of a map that communicates stop together, in both solves, and have the answer of one process."""

import pytest
import torch
import torch.distributed as dist

from phantom import DEQ, FixedPoint, fixed_point
from tests.phantom.processes import run_ranks
from tests.phantom.ranks_together import CASES, SOLVERS, outcome

EQUAL = 1e-9  # of solves to 1e-12, whose rows stop at other steps in a batch of their own

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks("tests.phantom.ranks_together", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("kind", "solver", "grad"), CASES)
def test_two_ranks_have_the_answer_of_one_process(ranks, kind, solver, grad):
    one, two = outcome(kind, solver, grad, rank=0, world=1), [rank[kind, solver, grad] for rank in ranks]
    assert two[0]["evals"] == two[1]["evals"], "ranks that communicate must evaluate f equally often"
    assert one["converged"] and all(rank["converged"] for rank in two)
    for name in ("value", "no_grad", "x"):
        found = torch.cat([rank[name] for rank in two])
        torch.testing.assert_close(found, one[name], rtol=EQUAL, atol=EQUAL, msg=name)
    for rank in two:
        torch.testing.assert_close(rank["weight"], one["weight"], rtol=EQUAL, atol=EQUAL)
    assert one["weight"].abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_ranks_alone_would_stop_apart(ranks, solver):
    """Without it the test above would prove nothing."""
    first, second = (rank["alone", solver, "upg"]["steps"] for rank in ranks)
    assert first < second


def test_one_process_needs_no_group():
    z0 = torch.zeros(2, 3)
    solution = fixed_point(lambda z: 0.5 * z + 1, z0, solver=FixedPoint(max_steps=60), group="world")
    assert torch.equal(solution.value, fixed_point(lambda z: 0.5 * z + 1, z0, solver=FixedPoint(max_steps=60)).value)


def test_what_is_no_group():
    with pytest.raises(TypeError, match=r'group must be a torch\.distributed.ProcessGroup, "world" or None, got 3'):
        DEQ(group=3)
