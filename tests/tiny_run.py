"""Runs of train.py on a few digits, with a network of a few hundred weights."""

import json
from pathlib import Path
from typing import Any

import train
from tests.plans import plan

MODEL = (
    *("model.channels=[4,8]", "model.head_channels=[2,2]", "model.final_channels=6", "model.num_groups=2"),
    "model.expansion=2",
)
# steps after the warm-up of the timer
TINY = (
    *MODEL,
    *("subset=24", "test_subset=20", "data.batch_size=8", "data.eval_batch_size=7"),
    *("solver.max_steps=3", "solver.tol=null", "optimizer=adam", "steps=8", "eval_every=4", "log_every=1"),
    *("wandb=disabled", "progress=false", "device=cpu"),
)


def tiny_run(runs: Path, *overrides: str) -> dict[str, Any]:
    """Train, or find the finished run, and return its record with the `path` of its folder."""
    job = [*TINY, *overrides, f"runs={runs}"]
    record = train.job(plan(job))
    return record | {"path": runs / record["folder"]}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
