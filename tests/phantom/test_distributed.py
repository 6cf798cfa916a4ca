"""Two processes give the gradients of one on the same global batch, whatever the estimator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.phantom.cases import ESTIMATORS
from tests.phantom.two_ranks import gradients

EQUAL = 1e-10
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.phantom.two_ranks"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_ranks_equal_one_process(ranks, name):
    alone = gradients(ESTIMATORS[name], rank=0, world=1)
    for rank in ranks:
        assert rank[name].keys() == alone.keys()
        for parameter, gradient in alone.items():
            torch.testing.assert_close(rank[name][parameter], gradient, rtol=EQUAL, atol=EQUAL, msg=parameter)
            assert gradient.abs().max() > 1e-3
