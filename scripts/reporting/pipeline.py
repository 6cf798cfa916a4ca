"""The page of the benchmark of input pipelines."""

from __future__ import annotations

from typing import Any

from scripts.reporting import markdown, provenance


def render(result: dict[str, Any]) -> markdown.Page:
    """Return the page of its result."""
    about = result["about"]
    rows = []
    for row in result["rows"]:
        low, high = (f"{1 / row['seconds'][end]:.0f}" for end in ("high", "low"))
        rows.append([row["label"], f"{row['items_per_second']:.0f} [{low}, {high}]"])
    return markdown.page(
        f"# {about['title']}",
        f"`{about['command']}`",
        f"{provenance.circumstances(about)} "
        "One process reads, decodes, cuts and normalises; a core of a worker does as many.",
        markdown.table(["", "pictures per second and core"], rows, "lr"),
    )
