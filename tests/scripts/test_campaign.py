"""A study on machines that are lent for minutes: the same line goes on from the folder that came back of the last one.

docs/campaign.md has the line. Here every call has a copy of the repository at another path, and small networks.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phantom.engine.artifacts import checkpoint
from tests.engine import tiny
from tests.plans import trained
from tests.tiny_run import MODEL

ROOT = Path(__file__).resolve().parents[2]
CODE = ("configs", "phantom", "models", "data", "scripts", "results/table1/study.yaml", "train.py")
ROWS = ("upg_k5_lam0.5", "implicit")  # the terms of NPG overflow where so small a model has a large Jacobian
OVERRIDES = [
    *("scale=paper", "data=images_synthetic", "data.size=8", "data.num_train=64", "data.num_test=32"),
    *("data.batch_size=8", "epochs=3", "log_every=1", "solver.max_steps=3", *MODEL),
    *("precision=tf32", "device=cpu", "wandb=disabled"),
]
SECONDS = 200


def machine(folder: Path) -> Path:
    """Return a bare machine: the code without records, runs or git."""
    for name in CODE:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def call(place: Path) -> subprocess.Popen[str]:
    """Start the line on a machine."""
    line = ["scripts/reproduce.py", "table1", f"rows={','.join(ROWS)}", "repeats=1", "deadline=540", "runs=back/runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place)}
    return subprocess.Popen(
        [sys.executable, *line, *OVERRIDES],
        **{"cwd": place, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )


def kept(place: Path) -> dict[str, dict]:
    found = (place / "results" / "table1").rglob("seed0.json")
    return {path.parent.name.partition("@")[0]: json.loads(path.read_text()) for path in found}


def num_rows(place: Path) -> int:
    return sum(path.read_text().count("\n") for path in (place / "back").rglob("metrics.jsonl"))


@pytest.mark.slow  # a minute and more
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_the_same_line_goes_on_elsewhere(tmp_path):
    first = machine(tmp_path / "first")
    process = call(first)
    end = time.monotonic() + SECONDS
    while num_rows(first) < 11:  # in the second epoch of the first row
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # as the deadline does to the runs
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 3 and "left: 2" in said and not kept(first), said

    second = machine(tmp_path / "second")
    shutil.copytree(first / "back", second / "back")
    process = call(second)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and set(kept(second)) == set(ROWS), said

    for row, record in kept(second).items():
        whole, expected = trained([f"experiment=table1/{row}", *OVERRIDES, "seed=0", f"runs={tmp_path / 'whole'}"])
        assert record["final"] == expected["final"] and record["steps"] == expected["steps"] == 24
        folder = second / "back" / "runs" / record["folder"]
        found, other = (checkpoint.load(each / "last.pt") for each in (folder, whole.folder))
        assert all(tiny.same(found[key], other[key]) for key in other.keys() - {"config", *tiny.CLOCKED})
        assert tiny.rows(folder) == tiny.rows(whole.folder)

    third = machine(tmp_path / "third")  # with the records, and no run folder
    shutil.copytree(second / "results", third / "results", dirs_exist_ok=True)
    process = call(third)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and "nothing is missing in table1" in said, said
