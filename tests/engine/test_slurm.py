"""Tasks of srun are the ranks of one run, and a sweep is not started by a launcher of many processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import train
from phantom.engine import command
from phantom.engine.errors import ConfigError
from phantom.engine.machine import slurm
from tests.tiny_run import TINY

ROOT = Path(__file__).parents[2]
STEP = {
    **{"SLURM_JOB_ID": "812", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04]"},
    **{"SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
}


def test_a_task_of_srun_is_a_rank():
    found = dict(STEP)
    slurm.adopt(found)
    named = {key: found[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert named == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03"}
    other = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm.adopt(other)
    assert other["MASTER_PORT"] == found["MASTER_PORT"] and 1024 < int(found["MASTER_PORT"]) < 32768
    second = {**STEP, "SLURM_STEP_ID": "3"}
    slurm.adopt(second)
    assert second["MASTER_PORT"] != found["MASTER_PORT"], "two steps of a job at a time"
    again = dict(found)
    slurm.adopt(again)
    assert again == found


@pytest.mark.parametrize(
    "change",
    [{"WORLD_SIZE": "1"}, {"WORLD_SIZE": "16", "RANK": "9"}, {"SLURM_STEP_NUM_TASKS": "1"}],
    ids=["kept apart", "torchrun under srun", "one task"],
)
def test_other_processes_are_left_as_they_are(change):
    found = STEP | change
    slurm.adopt(found)
    assert found == STEP | change
    script = {key: value for key, value in STEP.items() if not key.startswith("SLURM_STEP")}
    slurm.adopt(script)
    assert "RANK" not in script, "a job script is no task, whatever the number of tasks of its job"


@pytest.mark.parametrize(("visible", "local"), [("3", "0"), ("0,1,2,3", "1")], ids=["its own", "all of the node"])
def test_a_task_takes_the_gpu_that_it_sees(visible, local):
    found = {**STEP, "CUDA_VISIBLE_DEVICES": visible}
    slurm.adopt(found)
    assert found["LOCAL_RANK"] == local


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[3-5,8],login", "gpu3"),
        ("rack-2-n[007,010]", "rack-2-n007"),
        ("n[1-2]-ib", "n1-ib"),
        ("n1-ib,n[2-3]", "n1-ib"),
    ],
)
def test_the_first_node_is_found_in_every_spelling(nodes, first):
    assert slurm.first_node(nodes) == first


def test_a_list_without_a_node_is_a_sentence(monkeypatch):
    for key, value in {**STEP, "SLURM_STEP_NODELIST": "[]"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match=r"error: SLURM_STEP_NODELIST='\[\]' names no node: set MASTER_ADDR"):
        command.run(train.job, train.CONFIGS)
    given = {**STEP, "SLURM_STEP_NODELIST": "", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    slurm.adopt(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "4000")
    with pytest.raises(ConfigError):
        slurm.first_node("")


def test_two_tasks_train_one_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ways = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_STEP_NUM_TASKS": "2"}
    environment = {**os.environ, **STEP, **ways, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "train.py"), *TINY, f"runs={tmp_path}"]
    tasks = [
        subprocess.Popen(
            line,
            env={**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    (path,) = tmp_path.rglob("record.json")
    assert json.loads(path.read_text())["world_size"] == 2


def test_a_sweep_is_refused_under_a_launcher_with_the_way_to_do_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1", f"runs={tmp_path / 'runs'}"])
    with pytest.raises(SystemExit) as end:
        command.run(train.job, train.CONFIGS)
    for part in ("started it 8 times", "for seed in 0 1; do torchrun", "scripts/slurm/array.sbatch"):
        assert part in str(end.value)
    assert not list(tmp_path.iterdir())
