"""Train one run in a process of its own, for scripts that collect many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phantom.engine.artifacts import records
from phantom.engine.errors import ConfigError
from phantom.engine.plan import make_plan
from train import CONFIGS

ROOT = Path(__file__).parents[1]


def plan(overrides: Sequence[str]) -> tuple[dict[str, Any], str, Path]:
    """Return (resolved config, label, run folder) of `train.py <overrides>`; a mistake in them ends the script."""
    try:
        made = make_plan(overrides, CONFIGS)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    return made.config, made.label, ROOT / made.folder


def train(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run `train.py <overrides>` and return the record it leaves in `folder`, with the CPU seconds of that process.

    A finished run is not trained again, an interrupted one resumes; the seconds are those of the process that finished.

    Raises:
        RuntimeError: the process failed; the message holds the end of its output.
    """
    new = not (folder / "record.json").exists()
    command = [sys.executable, str(ROOT / "train.py"), *overrides, "progress=false"]
    # products of this size gain nothing from a second thread, and cores are used by other runs
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout))
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(output[-15:])}")
    path = folder / "record.json"
    record = json.loads(path.read_text())
    if new:
        record["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
        records.write_json(path, record)
    return record


def curve(folder: Path, split: str, metric: str) -> tuple[list[int], list[float]]:
    """Return (epochs, values) of a metric at every evaluation of a run on one split; both empty where it has none."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "eval" and row["split"] == split]
    return [row["epoch"] for row in rows], [row[metric] for row in rows]
