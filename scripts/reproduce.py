"""Run the rows of a table and keep their records.

    python scripts/reproduce.py table1                                  # all rows, all repeats, the paper's budget
    python scripts/reproduce.py table1 rows=upg_k5_lam0.5,implicit scale=smoke data.root=/data/cifar10
    python scripts/reproduce.py table1 list                             # the commands, one a line, and nothing run

Each run is `python train.py experiment=<table>/<row> seed=<n> ...`; finished runs are not run again, interrupted ones
resume. Records are copied to results/<table>/<row>[@scale]/seed<n>.json; `scripts/report.py` renders them. Overrides
that make it another experiment are in the name of the folder, which no table shows.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from phantom.engine.artifacts import records  # noqa: E402
from phantom.engine.errors import ConfigError  # noqa: E402
from phantom.engine.plan import make_plan  # noqa: E402
from train import CONFIGS  # noqa: E402

# overrides of train.py under which a run still is a run of its row; the table shows a precision
SAME_ROW = ("experiment", "scale", "precision", "gradient_precision", "deterministic")


class Job(NamedTuple):
    """One run: its command line, its record, and where the record is kept."""

    overrides: list[str]
    record: Path
    kept: Path


def jobs_of(row: str, overrides: Sequence[str]) -> Iterator[Job]:
    """Yield one job per repeat of an experiment; `repeats` is this script's, the rest is for train.py.

    Raises:
        ConfigError: the overrides do not compose, or set the seed.
    """
    if any(item.startswith("seed=") for item in overrides):
        raise ConfigError("seed is set by this script, from 0 to repeats - 1; use train.py for another one")
    made = make_plan([f"experiment={row}", *overrides], CONFIGS)
    config, label = made.config, made.label
    items = [f"experiment={row}", *(item for item in overrides if not item.startswith("repeats="))]
    other = [item for item in items if item.split("=")[0] not in SAME_ROW]
    extra = records.run_folder(Path(), label, other, 0).parent.name
    kept = ROOT / "results" / (label if extra == "default" else f"{label}@{extra}")
    for seed in range(config["repeats"]):
        folder = ROOT / records.run_folder(made.root, label, items, seed)
        yield Job([*items, f"seed={seed}"], folder / "record.json", kept / f"seed{seed}.json")


def main(arguments: Sequence[str]) -> None:
    """Run a table: its name first, then rows=..., list, and overrides of train.py."""
    tables = sorted({name.split("/")[0] for name in CONFIGS.leaves("experiment")})
    if not arguments or arguments[0] not in tables:
        sys.exit(f"error: name a table first, one of {', '.join(tables)}\n{__doc__}")
    table, *rest = arguments
    known = [name.removeprefix(f"{table}/") for name in CONFIGS.leaves("experiment") if name.startswith(f"{table}/")]
    named = [row for item in rest if item.startswith("rows=") for row in item.removeprefix("rows=").split(",")]
    unknown = [row for row in named if row not in known]
    if unknown:
        sys.exit(f"error: {table} has no row {', '.join(unknown)}; it has {', '.join(known)}")
    overrides = [item for item in rest if item != "list" and not item.startswith("rows=")]
    try:
        jobs = [job for row in named or known for job in jobs_of(f"{table}/{row}", overrides)]
    except ConfigError as error:
        sys.exit(f"error: {error}")
    for job in jobs:
        print(shlex.join(["python", "train.py", *job.overrides]), flush=True)
        if "list" in rest:
            continue
        if subprocess.run([sys.executable, str(ROOT / "train.py"), *job.overrides], cwd=ROOT).returncode:
            sys.exit("error: that run failed, see above; start again to resume there")
        records.write_json(job.kept, json.loads(job.record.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
