"""Job scripts for SLURM, run by bash with commands of SLURM's names on PATH that write down what they are asked."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import reproduce

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts/slurm"
FAKES = {
    "scontrol": 'case "$1" in show) echo node03; echo node04;; *) echo "$@" > "$FAKED/scontrol";; esac',
    # what follows the options of srun is run; those of the scripts have their value behind an equals sign
    "srun": 'printf "%s\\n" "$@" > "$FAKED/srun"; while [[ "$1" == -* ]]; do shift; done; exec "$@"',
    "torchrun": 'exec bash -c "$TASK"',
    "python": 'printf "%s\\n" "$@" > "$FAKED/python"; exec bash -c "${TASK:-true}"',
}
# a task that saves and exits as a run does: 128 + the number of SIGUSR2
SAVES = "trap 'echo saved >> $FAKED/saved; exit 140' USR2; touch $FAKED/begun; while :; do sleep 0.05; done"


@pytest.fixture
def room(tmp_path):
    """A folder that jobs are submitted from, with the fakes in `bin`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "faked").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/slurm").symlink_to(FOLDER)
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def begin(room: Path, script: str, *arguments: str, task: str = "true", **variables: str) -> subprocess.Popen:
    """Start a job script as slurmd does: a copy of it, in another folder."""
    copy = room / "spool"
    shutil.copyfile(FOLDER / script, copy)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
        **{"PATH": f"{room / 'bin'}:{os.environ['PATH']}", "FAKED": str(room / "faked"), "TASK": task},
        **{"SLURM_SUBMIT_DIR": str(room), "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2"},
        **{"SLURM_JOB_NODELIST": "node[03-04]", **variables},
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", str(copy), *arguments], env=environment, cwd="/", **pipes)


def asked(room: Path, name: str) -> list[str]:
    path = room / "faked" / name
    return path.read_text().splitlines() if path.exists() else []


def end_in_time(job: subprocess.Popen) -> tuple[int, str, str]:
    out, err = job.communicate(timeout=60)
    return job.returncode, out, err


def test_a_run_on_many_nodes_is_torchrun_on_each(room):
    assert end_in_time(begin(room, "train.sbatch", "model=mdeq_small", "data.root=/a b"))[0] == 0
    line = asked(room, "srun")
    assert line[1] == "torchrun" and line[-3:] == ["train.py", "model=mdeq_small", "data.root=/a b"]
    options = dict(item.removeprefix("--").split("=", 1) for item in line if item.startswith("--"))
    assert options["nnodes"] == "2" and options["nproc-per-node"] == "gpu" and options["rdzv-id"] == "4711"
    assert options["rdzv-endpoint"] == "node03:24711" and options["rdzv-backend"] == "c10d"
    assert "SIGUSR2" in options["signals-to-handle"].split(",") and asked(room, "scontrol") == []


def test_a_task_has_the_cores_that_the_job_asked_for(room):
    """srun does not hand on SLURM_CPUS_PER_TASK itself."""
    (room / "runs.txt").write_text("SEED=7 python train.py 'data.root=/it is here'\n")
    told = 'echo "$SRUN_CPUS_PER_TASK $SEED" > $FAKED/told'
    job = begin(room, "array.sbatch", "runs.txt", task=told, SLURM_ARRAY_TASK_ID="1", SLURM_CPUS_PER_TASK="8")
    assert end_in_time(job)[0] == 0 and asked(room, "told") == ["8 7"]
    assert asked(room, "python") == ["train.py", "data.root=/it is here"]


def test_torchrun_knows_the_options(room):
    from torch.distributed.run import parse_args

    end_in_time(begin(room, "train.sbatch", "epochs=1", PROCESSES="3"))
    line = asked(room, "srun")
    parsed = parse_args(line[line.index("torchrun") + 1 :])
    assert (parsed.nproc_per_node, parsed.training_script, parsed.training_script_args) == (
        "3",
        "train.py",
        ["epochs=1"],
    )
    assert parsed.signals_to_handle == "SIGTERM,SIGINT,SIGUSR2"


@pytest.mark.parametrize("script", ["train.sbatch", "array.sbatch"])
def test_the_signal_reaches_the_run_once_and_the_job_comes_again(room, script):
    (room / "runs.txt").write_text("python train.py seed=0\n")
    arguments = ["runs.txt"] if script == "array.sbatch" else []
    job = begin(room, script, *arguments, task=SAVES, SLURM_ARRAY_TASK_ID="1")
    end = time.monotonic() + 30
    while not (room / "faked/begun").exists() and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR2)  # to the shell alone, as --signal=B: does
    status, out, err = end_in_time(job)
    assert (status, asked(room, "saved"), asked(room, "scontrol")) == (140, ["saved"], ["requeue 4711"]), err
    assert "comes again" in out


@pytest.mark.parametrize(("task", "status"), [("exit 3", 3), ("exit 0", 0)])
def test_a_run_that_fails_or_is_finished_does_not_come_again(room, task, status):
    assert end_in_time(begin(room, "train.sbatch", task=task))[0] == status
    assert asked(room, "scontrol") == []


def test_a_run_that_is_finished_after_the_signal_does_not_come_again(room):
    task = "trap 'exit 0' USR2; touch $FAKED/begun; while :; do sleep 0.05; done"
    job = begin(room, "train.sbatch", task=task)
    while not (room / "faked/begun").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR2)
    assert end_in_time(job)[0] == 0 and asked(room, "scontrol") == []


def test_a_task_of_an_array_runs_its_line_of_a_study(room, capsys):
    reproduce.main(["table1", "rows=upg_k5_lam0.5,implicit", "data.root=/it's here", "again", "list"])
    lines = capsys.readouterr().out.splitlines()
    (room / "runs.txt").write_text("".join(f"{line}\n" for line in lines))
    assert len(lines) > 2
    for number in (2, len(lines)):
        status, out, err = end_in_time(begin(room, "array.sbatch", "runs.txt", SLURM_ARRAY_TASK_ID=str(number)))
        assert status == 0 and out.splitlines() == [lines[number - 1]], err
        assert asked(room, "python") == shlex.split(lines[number - 1])[1:], "quotes are the shell's"


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["runs.txt"], {"SLURM_ARRAY_TASK_ID": "3"}, "runs.txt has no line 3: submit with --array=1-2"),
        (["nothing.txt"], {"SLURM_ARRAY_TASK_ID": "1"}, "name a file that has a command a line"),
        ([], {"SLURM_ARRAY_TASK_ID": "1"}, "name a file that has a command a line"),
        (["runs.txt"], {}, "submit it with --array=1-"),
    ],
)
def test_a_mistake_is_a_sentence(room, arguments, variables, message):
    (room / "runs.txt").write_text("python train.py seed=0\npython train.py seed=1\n")
    status, _, err = end_in_time(begin(room, "array.sbatch", *arguments, **variables))
    assert status != 0 and message in err and asked(room, "srun") == []


def test_a_job_script_that_is_run_by_hand_says_what_it_is(room):
    status, _, err = end_in_time(begin(room, "train.sbatch", SLURM_SUBMIT_DIR=""))
    assert status != 0 and "submit this script with sbatch" in err


@pytest.mark.skipif(
    shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None,
    reason='shellcheck is not installed: pip install -e ".[dev]"',
)
def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(
        [program, "--external-sources", *sorted(map(str, FOLDER.iterdir()))], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
