"""The frame of a measure's page: statements of the paper with their numbers, then tables, then where they come from."""

from __future__ import annotations

from typing import Any

from scripts.reporting import markdown, provenance


def page(
    record: dict[str, Any],
    title: str,
    about: str,
    *blocks: str,
    heading: str = "What the paper says, and what was measured",
) -> markdown.Page:
    """Return the page of a record; `about` says what was measured, `blocks` are its tables and remarks.

    Args:
        heading: of the statements.
    """
    return markdown.page(
        f"# {title}",
        f"`{record['command']}`",
        about,
        f"## {heading}",
        markdown.table(["statement", "measured", "needed", "holds"], [_row(one) for one in record["claims"]], "lrrl"),
        *blocks,
        source(record),
    )


def source(record: dict[str, Any]) -> str:
    """Return the line that says where the numbers come from."""
    settings = ", ".join(f"{key} {_value(value)}" for key, value in record["settings"].items())
    where = f"one thread ({record['device'].split(',')[0]})"
    return (
        f"Settings: {settings}. {record['cpu_seconds']:.0f} CPU seconds on {where}, {record['finished'][:10]}, "
        f"commit {provenance.commit(record)}, torch {record['versions']['torch']}."
    )


def _row(one: dict[str, Any]) -> list[str]:
    # a null is a NaN: nothing was there to measure
    measured = "--" if one["measured"] is None else f"{one['measured']:.4g}"
    return [one["claim"], measured, one["needed"], "yes" if one["holds"] else "**no**"]


def _value(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    counting = all(isinstance(one, int) for one in value) and value == list(range(value[0], value[0] + len(value)))
    if len(value) > 4 and counting:
        return f"{value[0]} ... {value[-1]}"
    return f"({', '.join(map(str, value))})"
