"""The page of one benchmark: its variants by phase, their ratios, their memory."""

from __future__ import annotations

from typing import Any

from scripts.reporting import limits, markdown, pipeline, provenance, small

PHASES = ("solve", "attach", "backward", "optimizer", "rest", "total")
HEADS = ("variant", "solve", "attach", "backward", "optimiser", "rest", "total", "items/s")
HEADS += ("F", "F graph", "vjp", "ops", "syncs in the solve")
RATIOS = {
    "speedup": "Speed-up: the peer's step over ours",
    "overhead": "Overhead: our step over its floor",
    "implicit": "Implicit differentiation over the other estimators",
    "hoisting": "Without over with what the cell computes once per solve",
}
PARTS = ("solver", "solve_f", "activations", "backward", "total")


def render(result: dict[str, Any]) -> markdown.Page:
    """Return the page of a benchmark's result."""
    if result.get("kind") == "small":
        return small.render(result)
    if result.get("kind") == "pipeline":
        return pipeline.render(result)
    about = result["about"]
    blocks = [
        f"# {about['title']}",
        f"`{about['command']}`",
        f"{provenance.circumstances(about)} Milliseconds per step.",
        markdown.table(HEADS, [_row(row) for row in result["rows"]], "l" + "r" * 12),
    ]
    compiled = [f"{row['label']} {row['compile_seconds']:.0f} s" for row in result["rows"] if "compile_seconds" in row]
    if compiled:
        blocks.append(f"First step, compilation included (wall time): {', '.join(compiled)}.")
    for key, title in RATIOS.items():
        if result["ratios"][key]:
            parts = ("total", "solve", "backward")
            rows = [
                [f"{item['a']} / {item['b']}", *(interval_cell(item, part) for part in parts)]
                for item in result["ratios"][key]
            ]
            blocks += [f"## {title}", markdown.table(["", *parts], rows, "lrrr")]
    blocks += limits.blocks(result)
    traced = [row for row in result["rows"] if "peak_bytes" in row]
    if traced:
        heads = ["variant", "solver", "f in the solve", "activations", "backward", "total", "parameters"]
        blocks.append("## Memory of one step, MB at the peak of each part")
        blocks.append(markdown.table(heads, [_memory(row) for row in traced], "lrrrrrr"))
    grown = growth_table(result)
    if grown:
        blocks += ["## What the steps leave in memory", grown]
    return markdown.page(*blocks)


def growth_table(result: dict[str, Any]) -> markdown.Table | None:
    """Return a table of what many steps left in memory, None where that was not measured."""
    rows = []
    for row in result["rows"]:
        if "growth" in row:
            change = row["growth"]
            counts = [str(change["steps"]), f"{change['tensors']:+d}", f"{change['bytes']:+d}"]
            rows.append([row["label"], *counts, f"{change['memory'] / 1e6:+.2f}"])
    heads = ["variant", "steps", "live tensors", "their bytes", "memory, MB"]
    return markdown.table(heads, rows, "lrrrr") if rows else None


def interval_cell(item: dict[str, Any] | None, part: str) -> str:
    """Return `median [low, high]` of a part of a ratio, empty where it was not measured."""
    if item is None or part not in item:
        return ""
    return provenance.interval(item[part])


def _row(row: dict[str, Any]) -> list[str]:
    return [
        row["label"],
        *(f"{1e3 * row['seconds'][name]['median']:.0f}" for name in PHASES),
        f"{row['items_per_second']:.1f}" if "items_per_second" in row else "",
        *(str(row.get(key, "")) for key in ("evals", "graph_evals", "vjps")),
        str(sum(row["ops"].values())) if "ops" in row else "",
        str(row["syncs"]["solve"]) if "syncs" in row else "",
    ]


def _memory(row: dict[str, Any]) -> list[str]:
    own = f"{row['bytes']['parameters'] / 1e6:.1f}" if "bytes" in row else ""
    return [row["label"], *(f"{row['peak_bytes'][part] / 1e6:.1f}" for part in PARTS), own]
