"""The page of a whole suite of benchmarks: every comparison of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.reporting import limits, markdown, provenance, small
from scripts.reporting.benchmarks import growth_table, interval_cell

SPEED = ("model", "variant", "torchdeq / ours", "ours / floor")
SPEED += ("solver memory, ours / torchdeq", "syncs in the solve")
IMPLICIT = ("model", "against", "total", "backward", "total in torchdeq", "backward in torchdeq", "the paper")


def render(title: str, results: Sequence[tuple[str, str, dict[str, Any]]]) -> markdown.Page:
    """Return the page from (title of a row, the paper's number for it, result of its benchmark)."""
    speed, implicit, apart = [], [], []
    for name, paper, result in results:
        if result.get("kind") == "small":
            apart += [f"## {name}", small.table(result)]
            continue
        grown = growth_table(result)
        if grown:  # at a size chosen for that, whose times tell nothing
            apart += [f"## {name}", grown]
            continue
        speed += [[name, *cells] for cells in _speed(result)]
        implicit += [[name, *cells, paper] for cells in _implicit(result)]
    machines = sorted({result["about"]["machine"] for _, _, result in results})
    clocks = sorted({result["about"]["clock"] for _, _, result in results})
    return markdown.page(
        f"# {title}",
        f"{', '.join(machines)}; clock: {', '.join(clocks)}. Ratios of whole training steps paired by round: median, "
        "and the interval that holds it at 95 %. The floor of a step is its evaluations of f, their backward passes "
        "and vjps, the rest of the model, and nothing else, with the same cell. "
        f"{provenance.commit_line(result['about'] for _, _, result in results)}",
        markdown.table(SPEED, speed, "llrrrr"),
        "## Implicit differentiation over phantom gradients",
        markdown.table(IMPLICIT, implicit, "llrrrrl"),
        *limits.of_a_suite([(name, result) for name, _, result in results]),
        *apart,
    )


def _speed(result: dict[str, Any]) -> list[list[str]]:
    overheads = {item["a"]: item for item in result["ratios"]["overhead"]}
    peers = {item["b"]: item for item in result["ratios"]["speedup"]}
    rows = {row["label"]: row for row in result["rows"]}
    found = []
    for label, overhead in overheads.items():
        peer = peers.get(label)
        row, other = rows[label], rows.get(peer["a"]) if peer else None
        memory = ""
        if other is not None and "peak_bytes" in row and "peak_bytes" in other:
            memory = f"{row['peak_bytes']['solver'] / other['peak_bytes']['solver']:.2f}"
        syncs = str(row["syncs"]["solve"]) if "syncs" in row else ""
        found.append([label, interval_cell(peer, "total"), interval_cell(overhead, "total"), memory, syncs])
    return found


def _implicit(result: dict[str, Any]) -> list[list[str]]:
    """Return the cells of every pair of ours, beside the same pair of torchdeq where it was timed."""
    pairs = result["ratios"]["implicit"]
    peer_of = {item["b"]: item["a"] for item in result["ratios"]["speedup"]}
    theirs = {(item["a"], item["b"]): item for item in pairs}
    found = []
    for item in pairs:
        if item["a"].startswith("torchdeq"):
            continue
        other = theirs.get((peer_of.get(item["a"]), peer_of.get(item["b"])))
        found.append([item["b"], *(interval_cell(x, part) for x in (item, other) for part in ("total", "backward"))])
    return found
