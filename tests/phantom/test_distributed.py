"""Two processes give the gradients of one on the same global batch, whatever the estimator."""

import pytest
import torch
import torch.distributed as dist

from tests.phantom.cases import ESTIMATORS
from tests.phantom.processes import run_ranks
from tests.phantom.two_ranks import gradients

EQUAL = 1e-10

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks("tests.phantom.two_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_ranks_equal_one_process(ranks, name):
    alone = gradients(ESTIMATORS[name], rank=0, world=1)
    for rank in ranks:
        assert rank[name].keys() == alone.keys()
        for parameter, gradient in alone.items():
            torch.testing.assert_close(rank[name][parameter], gradient, rtol=EQUAL, atol=EQUAL, msg=parameter)
            assert gradient.abs().max() > 1e-3
