"""From timed rows to numbers: medians with their intervals, and ratios paired by round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scripts.bench.measure import PHASES, Row


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the order statistics that enclose the median with at least 95 % (the extremes where n is too small)."""
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n  # tail: probability that at most `below` values lie under the median
    while 2 * (tail + math.comb(n, below + 1) * 0.5**n) <= 0.05:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return ordered[below], ordered[n - 1 - below]


def median_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Return median, interval and n."""
    low, high = interval(values)
    return {"median": statistics.median(values), "low": low, "high": high, "n": len(values)}


def row_numbers(row: Row) -> dict[str, Any]:
    """Return everything measured about one row."""
    phases = {name: median_with_interval([t.get(name, 0.0) for t in row.times]) for name in PHASES}
    total = median_with_interval([row.total(i) for i in range(len(row.times))])
    numbers = {"label": row.variant.label, "role": row.role, "seconds": {**phases, "total": total}, **row.facts}
    if "items" in row.facts:
        numbers["items_per_second"] = row.facts["items"] / total["median"]
    return numbers


def ratio(a: Row, b: Row) -> dict[str, Any]:
    """Return a over b, paired by round: the whole step, and the backward and solve phases where both have them."""
    rounds = range(len(a.times))
    parts = {"total": median_with_interval([a.total(i) / b.total(i) for i in rounds])}
    for name in ("solve", "backward"):
        if all(t.get(name, 0.0) > 0 for row in (a, b) for t in row.times):
            parts[name] = median_with_interval([a.times[i][name] / b.times[i][name] for i in rounds])
    return {"a": a.variant.label, "b": b.variant.label, **parts}


def ratios(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Return overheads over the floor, speed-ups against the peer, and what differs in the method or its cell."""
    ours = [row for row in rows if row.role == "ours"]
    peers = {id(row.peer): row.peer for row in ours if row.peer}.values()
    return {
        "overhead": [ratio(row, row.floor) for row in ours if row.floor],
        "speedup": [ratio(row.peer, row) for row in ours if row.peer],
        "implicit": [ratio(a, b) for group in (ours, list(peers)) for a in group for b in group if comparable(a, b)],
        "hoisting": [ratio(a, b) for a in (*ours, *peers) for b in ours if _unhoisted(a, b)],
    }


def comparable(a: Row, b: Row) -> bool:
    """Return whether a is implicit, b is not, and nothing else tells them apart."""
    own = ("k=", "lam=", "adjoint_solver")  # of one of the two estimators alone
    words = [{w for w in row.variant.label.split() if not w.startswith(own)} for row in (a, b)]
    names = {"implicit", "upg", "npg", "bptt", "onestep", "shine"}
    return "implicit" in words[0] and "implicit" not in words[1] and words[0] - names == words[1] - names


def _unhoisted(a: Row, b: Row) -> bool:
    """Return whether a, ours or a peer's, does without what b computes once per solve, and nothing else differs."""
    hidden = ("torchdeq", "hoist=")
    words = [[w for w in row.variant.label.split() if not w.startswith(hidden)] for row in (a, b)]
    return b.setting.hoist and not a.setting.hoist and words[0] == words[1]
