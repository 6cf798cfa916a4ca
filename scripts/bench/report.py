"""From timed rows to numbers, and from numbers to a Markdown table."""

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


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, interval and n."""
    low, high = interval(values)
    return {"median": statistics.median(values), "low": low, "high": high, "n": len(values)}


def row_numbers(row: Row) -> dict[str, Any]:
    """Return everything measured about one row."""
    phases = {name: spread([t.get(name, 0.0) for t in row.times]) for name in PHASES}
    total = spread([row.total(i) for i in range(len(row.times))])
    numbers = {"label": row.variant.label, "role": row.role, "seconds": {**phases, "total": total}, **row.facts}
    if "items" in row.facts:
        numbers["items_per_second"] = row.facts["items"] / total["median"]
    return numbers


def ratio(a: Row, b: Row) -> dict[str, Any]:
    """Return a over b, paired by round: the whole step, and the backward and solve phases where both have them."""
    rounds = range(len(a.times))
    parts = {"total": spread([a.total(i) / b.total(i) for i in rounds])}
    for name in ("solve", "backward"):
        if all(t.get(name, 0.0) > 0 for row in (a, b) for t in row.times):
            parts[name] = spread([a.times[i][name] / b.times[i][name] for i in rounds])
    return {"a": a.variant.label, "b": b.variant.label, **parts}


def ratios(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Return overheads over the floor, speed-ups against the peer, and what differs in the method or its cell."""
    ours = [row for row in rows if row.role == "ours"]
    peers = {id(row.peer): row.peer for row in ours if row.peer}.values()
    return {
        "overhead": [ratio(row, row.floor) for row in ours],
        "speedup": [ratio(row.peer, row) for row in ours if row.peer],
        "implicit": [ratio(a, b) for group in (ours, list(peers)) for a in group for b in group if _comparable(a, b)],
        "hoisting": [ratio(a, b) for a in (*ours, *peers) for b in ours if _unhoisted(a, b)],
    }


def _comparable(a: Row, b: Row) -> bool:
    """Return whether a is implicit, b is not, and nothing else tells them apart."""
    words = [{w for w in row.variant.label.split() if not w.startswith("k=")} for row in (a, b)]
    names = {"implicit", "upg", "npg", "bptt"}
    return "implicit" in words[0] and "implicit" not in words[1] and words[0] - names == words[1] - names


def _unhoisted(a: Row, b: Row) -> bool:
    """Return whether a, ours or a peer's, does without what b computes once per solve, and nothing else differs."""
    hidden = ("torchdeq", "hoist=")
    words = [[w for w in row.variant.label.split() if not w.startswith(hidden)] for row in (a, b)]
    return b.setting.hoist and not a.setting.hoist and words[0] == words[1]


def render(result: dict[str, Any]) -> str:
    """Return the result of a benchmark as Markdown."""
    about = result["about"]
    lines = [
        f"# {about['title']}",
        "",
        f"`{about['command']}`",
        "",
        f"{about['machine']}, {about['threads']} thread(s), torch {about['torch']}, clock: {about['clock']}. "
        f"Median of {about['repeats']} interleaved rounds, with the order-statistic interval that holds the median at "
        "95 % in brackets. Milliseconds per step.",
        "",
        "| variant | solve | attach | backward | optimiser | rest | total | items/s | F | F graph | vjp | ops | syncs "
        "in the solve |",
        "| --- |" + " ---: |" * 12,
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        ms = [f"{1e3 * seconds[name]['median']:.0f}" for name in (*PHASES, "total")]
        counts = [_known(row, "evals"), _known(row, "graph_evals"), _known(row, "vjps")]
        ops = str(sum(row["ops"].values())) if "ops" in row else ""
        syncs = str(row["syncs"]["solve"]) if "syncs" in row else ""
        speed = f"{row['items_per_second']:.1f}" if "items_per_second" in row else ""
        lines.append("| " + " | ".join([row["label"], *ms, speed, *counts, ops, syncs]) + " |")
    compiled = [f"{row['label']} {row['compile_seconds']:.0f} s" for row in result["rows"] if "compile_seconds" in row]
    if compiled:
        lines += ["", f"First step, compilation included (wall time): {', '.join(compiled)}."]
    titles = {
        "speedup": "Speed-up: the peer's step over ours",
        "overhead": "Overhead: our step over its floor",
        "implicit": "Implicit differentiation over the other estimators",
        "hoisting": "Without over with what the cell computes once per solve",
    }
    for key, title in titles.items():
        if result["ratios"][key]:
            lines += ["", f"## {title}", "", "| | total | solve | backward |", "| --- | ---: | ---: | ---: |"]
            for item in result["ratios"][key]:
                cells = [interval_cell(item, part) for part in ("total", "solve", "backward")]
                lines.append(f"| {item['a']} / {item['b']} | " + " | ".join(cells) + " |")
    traced = [row for row in result["rows"] if "peak_bytes" in row]
    if traced:
        lines += ["", "## Memory of one step, MB at the peak of each part", ""]
        lines += ["| variant | solver | f in the solve | activations | backward | total | parameters |"]
        lines += ["| --- |" + " ---: |" * 6]
        for row in traced:
            peak = row["peak_bytes"]
            parts = [peak[name] for name in ("solver", "solve_f", "activations", "backward", "total")]
            cells = [f"{part / 1e6:.1f}" for part in parts]
            cells.append(f"{row['bytes']['parameters'] / 1e6:.1f}" if "bytes" in row else "")
            lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    grown = growth_table(result)
    if grown:
        lines += ["", "## What the steps leave in memory", "", *grown]
    return "\n".join(lines) + "\n"


def growth_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of a table of what many steps left in memory, empty where that was not measured."""
    rows = [row for row in result["rows"] if "growth" in row]
    if not rows:
        return []
    lines = ["| variant | steps | live tensors | their bytes | memory, MB |", "| --- |" + " ---: |" * 4]
    for row in rows:
        change = row["growth"]
        cells = [str(change["steps"]), f"{change['tensors']:+d}", f"{change['bytes']:+d}"]
        lines.append(f"| {row['label']} | " + " | ".join([*cells, f"{change['memory'] / 1e6:+.2f}"]) + " |")
    return lines


def interval_cell(item: dict[str, Any] | None, part: str) -> str:
    """Return `median [low, high]` of a part of a ratio, empty where it was not measured."""
    if item is None or part not in item:
        return ""
    return f"{item[part]['median']:.2f} [{item[part]['low']:.2f}, {item[part]['high']:.2f}]"


def _known(row: dict[str, Any], key: str) -> str:
    return str(row[key]) if key in row else ""
