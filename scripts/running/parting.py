"""Where two runs part: the first row of metrics.jsonl, and the number in it, that is not the same."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from scripts import logged

ROOT = Path(__file__).parents[2]
# numbers of the machine, not of the mathematics
MACHINE = ("time/", "items_per_second", "peak_memory")
# a short run that logs every step, unless the command line says otherwise
SHORT = {"steps": "8", "log_every": "1", "wandb": "disabled", "progress": "false", "device": "cpu"}


class Parting(NamedTuple):
    """Where two runs part.

    Args:
        row: what the row is, as in `train step 3`.
        key: of the number; None where one of the runs lacks the row.
        values: of both runs; None where a run has no such number.
    """

    row: str
    key: str | None
    values: tuple[Any, Any]

    def __str__(self) -> str:
        if self.key is None:
            return f"{self.row}: only the {'first' if self.values[1] is None else 'second'} run has it"
        a, b = self.values
        both = all(isinstance(value, (int, float)) for value in self.values)
        relative = f", relative {abs(a - b) / max(abs(a), abs(b)):.1e}" if both else ""
        return f"{self.row}: {self.key} is {a} against {b}{relative}"


def part(first: list[dict[str, Any]], second: list[dict[str, Any]], *, rtol: float = 0.0) -> Parting | None:
    """Return where the rows of two runs part; None where all their numbers are the same.

    Args:
        rtol: relative difference that counts as none.
    """
    rows, others = ({_name(row): row for row in run} for run in (first, second))
    for name in sorted({**rows, **others}, key=lambda name: (rows.get(name) or others[name])["step"]):
        if name not in rows or name not in others:
            return Parting(name, None, (rows.get(name), others.get(name)))
        row, other = rows[name], others[name]
        for key in [*row, *(key for key in other if key not in row)]:
            a, b = row.get(key), other.get(key)
            if not key.startswith(MACHINE) and not _same(a, b, rtol):
                return Parting(name, key, (a, b))
    return None


def counted(rows: list[dict[str, Any]]) -> int:
    """Return how many numbers of a run are compared."""
    return sum(
        isinstance(value, (int, float)) and not key.startswith(MACHINE) for row in rows for key, value in row.items()
    )


def is_run(side: str) -> bool:
    """Return whether a side is the folder of a run."""
    return (Path(side) / "metrics.jsonl").is_file()


def read(side: str, overrides: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a side: those of a run folder, or of a run of `overrides` in the empty `folder`.

    Args:
        side: a run folder; a config, as the overrides of train.py with spaces between; or a commit, whose own code is
            run. `.` is the code as it stands.

    Raises:
        RuntimeError: it is none of these, or its run failed.
    """
    if is_run(side):
        return _rows(Path(side) / "metrics.jsonl")
    # the folder of a run has equal signs in its name, and so has a config
    if "=" in side and (Path(side).is_dir() or not _is_config(side)):
        raise RuntimeError(f"{side} is no run folder: it holds no metrics.jsonl")
    if side == "." or "=" in side:
        return _run(ROOT, [*overrides, *(side.split() if "=" in side else [])], folder)
    with _checkout(side, folder / "code") as code:
        return _run(code, overrides, folder)


def _run(code: Path, overrides: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    given = {item.split("=")[0] for item in overrides}
    items = [*(f"{key}={value}" for key, value in SHORT.items() if key not in given), *overrides]
    runs = folder / "runs"
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(code / "train.py"), *items, f"runs={runs}"]
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    found = sorted(runs.rglob("metrics.jsonl"))
    if done.returncode != 0 or len(found) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(
            f"train.py {shlex.join(items)} failed: {said[-1] if said else f'it ended with {done.returncode}'}"
        )
    return _rows(found[0])


@contextmanager
def _checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Give the code of a commit in a folder of its own, and take it away afterwards."""
    git = ["git", "-C", str(ROOT)]
    added = subprocess.run(
        [*git, "worktree", "add", "--quiet", "--detach", str(folder), commit], capture_output=True, text=True
    )
    if added.returncode != 0:
        raise RuntimeError(f"{commit!r} is no run folder, no config (key=value) and no commit: {added.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True, capture_output=True)


def _is_config(side: str) -> bool:
    """Return whether the side is items of a command line: no key but Hydra's own has a slash."""
    keys = [item.partition("=")[0] for item in side.split()]
    return all("/" not in key or key.startswith("hydra/") for key in keys)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows, damaged = logged.read(path)
    if damaged:  # where two runs part, the line may be the one that says so
        raise RuntimeError(f"{path} has damaged lines ({damaged}): it cannot be compared")
    return rows


def _name(row: dict[str, Any]) -> str:
    return f"{row.get('split', row['kind'])} step {row['step']}"


def _same(a: Any, b: Any, rtol: float) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= rtol * max(abs(a), abs(b))
    return a == b
