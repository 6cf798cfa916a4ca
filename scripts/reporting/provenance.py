"""Where numbers come from, in words: the commit, the command and the machine of a record or a benchmark."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any


def commits(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the commits of the records, -- where there are no records; * marks uncommitted changes."""
    return ", ".join(sorted({commit(record) for record in records})) or "--"


def commit(record: Mapping[str, Any]) -> str:
    """Return the commit of a record, which may be one of several runs, or `none`; * marks uncommitted changes."""
    names = (record.get("commit") or "none").split(", ")
    return ", ".join(name[:8] for name in names) + "*" * bool(record.get("dirty"))


def commit_line(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the sentence on the commits of the records, which explains the mark."""
    return f"Commit {commits(records)} (* marks uncommitted changes)."


def command(record: Mapping[str, Any]) -> str:
    """Return the command that makes the run of a record again."""
    if "folds" in record:
        study, _, row = record["experiment"].partition("/")
        more = [item for item in record["overrides"] if not item.startswith("experiment=")]
        return shlex.join(["python", "scripts/reproduce.py", study, f"rows={row}", *more])
    return shlex.join(["python", "train.py", *record["overrides"], f"seed={record['seed']}"])


def circumstances(about: Mapping[str, Any]) -> str:
    """Return on what a benchmark was measured, by which code, and what its brackets are."""
    return (
        f"{about['machine']}, {about['threads']} thread(s), torch {about['torch']}, clock: {about['clock']}. "
        f"{commit_line([about])} "
        f"Median of {about['repeats']} interleaved rounds, with the order-statistic interval that holds the median at "
        "95 % in brackets."
    )


def interval(part: Mapping[str, float]) -> str:
    """Return `median [low, high]`."""
    return f"{part['median']:.2f} [{part['low']:.2f}, {part['high']:.2f}]"
