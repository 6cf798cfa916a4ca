"""The page of the benchmark of small states."""

from __future__ import annotations

from typing import Any

from scripts.reporting import markdown, provenance


def render(result: dict[str, Any]) -> markdown.Page:
    """Return the page of its result."""
    about = result["about"]
    rows = [[row["label"], f"{1e6 * row['seconds']['median']:.0f}", str(row["evals"])] for row in result["rows"]]
    return markdown.page(
        f"# {about['title']}",
        f"`{about['command']}`",
        f"{provenance.circumstances(about)} A solve per evaluation of f, a step (forward and backward) as a whole.",
        table(result),
        "## Microseconds",
        markdown.table(["", "microseconds", "divided by"], rows, "lrr"),
    )


def table(result: dict[str, Any]) -> markdown.Table:
    """Return the ratios, ours over the bare loop or over torchdeq's."""
    rows = [[item["a"], item["b"], provenance.interval(item["total"])] for item in result["ratios"]]
    return markdown.table(["ours", "over", "ratio"], rows, "llr")
