"""The page of the benchmark of small states."""

from __future__ import annotations

from typing import Any

from scripts.reporting import markdown


def render(result: dict[str, Any]) -> str:
    """Return the page of its result."""
    about = result["about"]
    rows = [[row["label"], f"{1e6 * row['seconds']['median']:.0f}", str(row["evals"])] for row in result["rows"]]
    return markdown.page(
        f"# {about['title']}",
        f"`{about['command']}`",
        f"{about['machine']}, {about['threads']} thread(s), torch {about['torch']}, clock: {about['clock']}. "
        f"Median of {about['repeats']} interleaved rounds, with the order-statistic interval that holds the median at "
        "95 % in brackets. A solve per evaluation of f, a step (forward and backward) as a whole.",
        table(result),
        "## Microseconds",
        markdown.table(["", "microseconds", "divided by"], rows, "lrr"),
    )


def table(result: dict[str, Any]) -> str:
    """Return the ratios, ours over the bare loop or over torchdeq's."""
    rows = [
        [item["a"], item["b"], f"{part['median']:.2f} [{part['low']:.2f}, {part['high']:.2f}]"]
        for item in result["ratios"]
        for part in (item["total"],)
    ]
    return markdown.table(["ours", "over", "ratio"], rows, "llr")
