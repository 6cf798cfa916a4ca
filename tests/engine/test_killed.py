"""`kill -9` at any moment, then the same command again: the run ends as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phantom.engine.artifacts import checkpoint
from tests.engine import tiny
from tests.plans import trained

ROOT = Path(__file__).resolve().parents[2]
STEPS = 36  # twelve epochs of three
JOB = [
    *("data=digits", "subset=60", "test_subset=40", "data.batch_size=20", "epochs=12", "checkpoint_every=4"),
    *("model.dropout=0.2", "ema=0.9", "solver.max_steps=4", "accumulate=2", "log_every=1", "wandb=disabled"),
]
SECONDS = 200


def finish(runs: Path) -> Path:
    """Train to the end in this process and return the run folder."""
    job = [*JOB, f"runs={runs}"]
    return trained(job)[0].folder


def kill_once(runs: Path, *, after_rows: int, delay: float) -> int:
    """Run train.py on what is there, kill it `delay` seconds after a row count, and return the rows then written."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *JOB, f"runs={runs}"], cwd=ROOT, env=environment, text=True
    )
    try:
        end = time.monotonic() + SECONDS
        while num_rows(runs) < after_rows:
            assert process.poll() is None and time.monotonic() < end, "the run ended before it could be killed"
            time.sleep(0.01)
        time.sleep(delay)
    finally:
        process.kill()
    assert process.wait() == -9
    return num_rows(runs)


def num_rows(runs: Path) -> int:
    return sum(path.read_text().count("\n") for path in runs.rglob("metrics.jsonl"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return finish(tmp_path_factory.mktemp("whole"))


def assert_same_run(folder: Path, whole: Path) -> None:
    for name in ("last.pt", "best.pt"):
        found, expected = (checkpoint.load(each / name) for each in (folder, whole))
        for key in expected.keys() - {"config", *tiny.CLOCKED}:  # a config names the folder of all runs
            assert tiny.same(found[key], expected[key]), (name, key)
    assert tiny.rows(folder) == tiny.rows(whole)
    records = [json.loads((each / "record.json").read_text()) for each in (folder, whole)]
    for key in ("steps", "final", "best", "train", "config_hash", "num_parameters"):
        assert records[0][key] == records[1][key], key
    assert records[0]["steps"] == STEPS


def finish_killed(runs: Path) -> Path:
    """Resume where train.py stopped, and return the run folder."""
    (last,) = runs.rglob("last.pt")
    last.parent.rename(runs / "run")
    return finish(runs)


def test_killed_once(tmp_path, whole):
    """Three steps an epoch and an evaluation after them: row nine is that of the first step of the third epoch."""
    kill_once(tmp_path, after_rows=9, delay=0.05)
    assert_same_run(finish_killed(tmp_path), whole)


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path, whole):
    draws = random.Random()
    seen = 4  # the first checkpoint comes with the evaluation before this
    for _ in range(5):
        after_rows, delay = seen + draws.randint(1, 4), draws.uniform(0, 0.1)
        seen = kill_once(tmp_path, after_rows=after_rows, delay=delay)
        (last,) = tmp_path.rglob("last.pt")
        print(
            f"killed {delay:.3f} s after row {after_rows}, at {seen} rows, checkpoint {checkpoint.load(last)['step']}"
        )
    assert_same_run(finish_killed(tmp_path), whole)
    print(f"after {STEPS} steps: the same weights, states and rows as the unbroken run")
