"""The rows of a run's metrics.jsonl, for all scripts: some of them run without torch, which the engine imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return (rows, how many lines are damaged and left out).

    The last line of a run that was killed may be cut short: it is left out and does not count, as where the run itself
    goes on. A number that is not finite is None, as a run writes it.

    Raises:
        OSError: the file cannot be read.
    """
    found = [_row(line) for line in path.read_bytes().splitlines()]
    return [row for row in found if row is not None], found[:-1].count(None)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):  # neither JSON nor UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
