"""DistributedDataParallel around a model with a solve: static_graph, and a compiled map, with two ranks."""

import pytest
import torch
import torch.distributed as dist

from tests.phantom.processes import run_ranks
from tests.phantom.wrapped import COMPILED, GRADS

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def check(folder, kind: str, names) -> None:
    """The gradients of two ranks are those of one process on the whole batch."""
    found = run_ranks("tests.phantom.wrapped", folder, kind, seconds=300)
    assert all(rank.keys() == set(names) for rank in found)
    for rank in found:
        for name, (gradients, expected) in rank.items():
            for step, wanted in zip(gradients, expected, strict=True):
                for a, b in zip(step, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=f"{kind} {name}")


def test_static_graph_serves_every_estimator(tmp_path):
    """With one backward pass a step."""
    check(tmp_path, "static_graph", GRADS)


@pytest.mark.parametrize("kind", ["plain", "find_unused"])
def test_accumulation_serves_every_estimator(tmp_path, kind):
    check(tmp_path, kind, GRADS)


@pytest.mark.slow  # half a minute of compiling on each rank
def test_a_compiled_map_serves_two_ranks(tmp_path):
    check(tmp_path, "compiled", COMPILED)
