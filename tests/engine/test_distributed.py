"""The set-up of one process, and what several need that this machine cannot give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from phantom import DEQ
from phantom.engine.machine import distributed
from tests.engine import tiny

ROOT = Path(__file__).parents[2]


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.start("cpu") == (tiny.CPU, 0, 1)
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    model = nn.BatchNorm1d(2)
    before = model.running_mean.clone()
    distributed.share_buffers(model)
    distributed.barrier()
    distributed.stop()
    assert distributed.wrap(model, tiny.CPU, 1, sync_batchnorm=True) is model
    assert torch.equal(model.running_mean, before)


def test_a_cpu_takes_denormal_numbers_for_zero(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    torch.set_flush_denormal(False)
    small = torch.tensor([1e-30])
    assert (small * 1e-10).item() > 0
    distributed.start("cpu")
    assert (small * 1e-10).item() == 0


def test_auto_takes_a_gpu_when_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for available, place in ((False, tiny.CPU), (True, torch.device("cuda", 3))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert distributed.start("auto")[0] == place
    assert chosen == [3]


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device=cuda, but torch sees no GPU here: use device=cpu"):
        distributed.start("cuda")


class Normed(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.stem, self.cell, self.deq = nn.SyncBatchNorm(2), cell, DEQ()


@pytest.mark.parametrize("inside", [True, False])
def test_ranks_stop_together_where_the_map_has_a_norm_over_them(inside):
    model = Normed(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2) if inside else nn.BatchNorm1d(2)))
    distributed.stop_together(model)
    assert model.deq.group == ("world" if inside else None)
    with pytest.raises(KeyError), distributed.stopping_apart(model):
        assert model.deq.group is None, "in evaluation ranks have unlike numbers of batches"
        raise KeyError
    assert model.deq.group == ("world" if inside else None)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the threads of a process are listed on Linux")
def test_stop_leaves_no_thread_of_the_group(tmp_path):
    """A thread that is left may abort the process as it exits, after all of its work."""
    script = tmp_path / "script.py"
    script.write_text(
        "import gc\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from phantom.engine.machine import distributed\n"
        "def left():\n"
        "    return sum('gloo' in (task / 'comm').read_text() for task in Path('/proc/self/task').iterdir())\n"
        "device, rank, world = distributed.start('cpu')\n"
        "model = distributed.wrap(torch.nn.Linear(3, 3), device, world, sync_batchnorm=False)\n"
        "model(torch.ones(2, 3)).sum().backward()\n"
        "during = left()\n"
        "distributed.stop()\n"
        "del model\n"  # it holds the group, too
        "gc.collect()\n"
        f"Path({str(tmp_path)!r}, str(rank)).write_text(f'{{during > 0}} {{left()}}')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True 0", "True 0"]
