"""Run the rows of a table and keep their records.

    python scripts/reproduce.py table1                                  # all rows, all repeats, the paper's budget
    python scripts/reproduce.py table1 rows=upg_k5_lam0.5,implicit scale=smoke data.root=/data/cifar10

Each run is `python train.py experiment=<table>/<row> seed=<n> ...`; finished runs are not run again, interrupted ones
resume. Records are copied to results/<table>/<row>[@scale]/seed<n>.json; `scripts/report.py` renders them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from phantom.engine import build, cli, records  # noqa: E402


def main(arguments: list[str]) -> None:
    """Run a table: its name first, then rows=..., then overrides of train.py."""
    tables = sorted(path.name for path in (ROOT / "configs" / "experiment").iterdir() if path.is_dir())
    if not arguments or arguments[0] not in tables:
        sys.exit(f"error: name a table first, one of {', '.join(tables)}\n{__doc__}")
    table, *rest = arguments
    rows = sorted(path.stem for path in (ROOT / "configs" / "experiment" / table).glob("*.yaml"))
    wanted = [item.removeprefix("rows=").split(",") for item in rest if item.startswith("rows=")]
    overrides = [item for item in rest if not item.startswith("rows=")]
    for row in wanted[0] if wanted else rows:
        if row not in rows:
            sys.exit(f"error: {table} has no row {row!r}; it has {', '.join(rows)}")
        job = [f"experiment={table}/{row}", *overrides]
        try:
            config, choices = cli.compose(job)
        except build.ConfigError as error:
            sys.exit(f"error: {error}")
        for seed in range(config["repeats"]):
            print(f"{row}: seed {seed} of {config['repeats']}", flush=True)
            run = subprocess.run([sys.executable, str(ROOT / "train.py"), *job, f"seed={seed}"], cwd=ROOT)
            if run.returncode:
                sys.exit(f"error: {row} with seed {seed} failed; see above")
            label = build.label_of(config, choices)
            folder = records.run_folder(config["runs"], label, job, seed)
            record = json.loads((ROOT / folder / "record.json").read_text())
            records.write_json(ROOT / "results" / label / f"seed{seed}.json", record)


if __name__ == "__main__":
    main(sys.argv[1:])
