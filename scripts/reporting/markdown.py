"""The one writer of Markdown: pages made of paragraphs and tables."""

from __future__ import annotations

from collections.abc import Sequence


def page(*blocks: str) -> str:
    """Return a page of headings, paragraphs and tables, an empty line between two of them."""
    return "\n\n".join(blocks) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Return a table.

    Args:
        align: a letter per column, `r` for numbers that end at the right, `l` for the rest; `l` is left out at the end.

    Raises:
        ValueError: a row has not as many cells as the table has columns.
    """
    wrong = [row for row in rows if len(row) != len(heads)]
    if wrong:
        raise ValueError(f"{wrong[0]} has {len(wrong[0])} cells, the table has the columns {', '.join(heads)}")
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(heads), "l")]
    head = _line(heads).replace("|  |", "| |")  # a column without a name
    return "\n".join([head, _line(rules), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
