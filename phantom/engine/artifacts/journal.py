"""What a run tells as it goes: rows for metrics.jsonl and the tracker, a bar or lines for the person who watches."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phantom.engine.artifacts import files
from phantom.engine.artifacts.records import to_json
from phantom.engine.artifacts.tracking import Tracker
from phantom.engine.display import Progress
from phantom.engine.errors import LockedError

log = logging.getLogger(__name__)


class Journal:
    """Pass on the rows of a run. On all ranks but the first it is silent.

    Args:
        folder: of the run.
        step: where the run stands; later rows of metrics.jsonl are dropped, for the run writes them again.
        total: steps of the run.
        main: whether this is the first rank.
        shown: whether a person watches.
        metric: the task's headline number.
        open_tracker: called on the first rank alone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        total: int,
        main: bool,
        shown: bool,
        metric: str,
        open_tracker: Callable[[], Tracker],
    ) -> None:
        self._log = MetricsLog(folder / "metrics.jsonl", keep_until=step) if main else None
        self._tracker = open_tracker() if main else None
        self._progress = Progress(total, done=step, enabled=main and shown, metric=metric)

    def step(self, step: int, epoch: int) -> None:
        """Move the bar."""
        self._progress.step(step, epoch)

    def write(self, row: Mapping[str, Any], *, step: int, epoch: int) -> None:
        """Pass on a row, of a `kind`: `train`, `eval` or `monitor`."""
        row = {"kind": row["kind"], "step": step, "epoch": epoch, **row}
        if self._log is not None and self._tracker is not None:
            self._log.write(row)
            self._tracker.log(row)
        if row["kind"] == "train":
            self._progress.train_row(row)
        elif row["kind"] == "eval":
            self._progress.eval_row(row)

    def sync(self) -> None:
        """Put the rows on the disk: a checkpoint must not survive a power cut without the rows before it."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """End the file and the bar, and leave the tracker open for `finish`."""
        self._progress.stop()
        if self._log is not None:
            self._log.close()

    def abort(self) -> None:
        """Close the tracker of a run that failed."""
        if self._tracker is not None:
            self._tracker.abort()

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close the tracker with what it can show of the final record."""
        if self._tracker is not None:
            shown = {key: value for key, value in record.items() if isinstance(value, (int, float, str, dict))}
            self._tracker.finish(shown)


class MetricsLog:
    """Append rows to metrics.jsonl; each row names its `kind`, `step` and `epoch`."""

    def __init__(self, path: Path, *, keep_until: int) -> None:
        """Open `path`, dropping rows after step `keep_until`: a resumed run writes those again."""
        self._path = path
        found = _whole_lines(path) if keep_until > 0 else []
        with files.whole(path) as file:
            file.writelines(line + b"\n" for line, row in found if row["step"] <= keep_until)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(to_json(row) + "\n")

    def sync(self) -> None:
        """Put the rows on the disk: a checkpoint must not survive a power cut without the rows before it.

        Raises:
            LockedError: the file is no longer at its path: what follows would be written to nowhere, or over another
                run that began there, for the lock went with the folder.
        """
        in_place = False
        with contextlib.suppress(OSError):
            in_place = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        if not in_place:
            raise LockedError(
                f"{self._path} is no longer the file that this run writes: it or its folder was moved, removed or "
                "replaced. The run ends without this checkpoint; the one before is where the folder is now"
            )
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, none where there is no file; damaged lines are left out, and said."""
    return [row for _, row in _whole_lines(path)]


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines that are whole, each with its row."""
    try:
        lines = files.read(path).splitlines()
    except FileNotFoundError:
        lines = []
    found = [(line, _row_of(line)) for line in lines]
    damaged = sum(row is None for _, row in found[:-1])  # the last line of a killed run may be cut short
    if damaged:
        log.warning("%s: damaged lines are left out (%d)", path, damaged)
    return [(line, row) for line, row in found if row is not None]


def _row_of(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # neither JSON nor UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
