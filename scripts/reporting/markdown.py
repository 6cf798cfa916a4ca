"""The one writer of Markdown: pages made of paragraphs and tables, whose tables are written as CSV and LaTeX, too."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

# what LaTeX reads as something else
SPECIAL = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "|": r"$|$"},
    "\\": r"\textbackslash{}",
}


class Table(str):
    """A table: the string is its Markdown, and it keeps the cells for other formats.

    Args:
        heads, rows: cells as they stand in Markdown, but for `|`, which is escaped here.
        align: a letter per column, `r` for numbers that end at the right, `l` for the rest.
    """

    heads: list[str]
    rows: list[list[str]]
    align: str

    def __new__(cls, heads: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> Table:
        rules = ["---:" if letter == "r" else "---" for letter in align]
        head = _line(heads).replace("|  |", "| |")  # a column without a name
        made = super().__new__(cls, "\n".join([head, _line(rules), *map(_line, rows)]))
        made.heads, made.rows, made.align = list(heads), [list(row) for row in rows], align
        return made

    def csv(self) -> str:
        """Return the table as CSV, the heads in the first line."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self._plain())
        return text.getvalue()

    def latex(self) -> str:
        """Return the table as a `tabular` of LaTeX, without any package."""
        lines = [_kept(" & ".join(map(_escaped, cells))) + r" \\" for cells in self._plain()]
        lines.insert(1, r"\hline")
        return "\n".join([rf"\begin{{tabular}}{{{self.align}}}", *lines, r"\end{tabular}"]) + "\n"

    def _plain(self) -> list[list[str]]:
        """Return heads and rows without the marks of Markdown."""
        return [[cell.replace("**", "").replace("`", "") for cell in cells] for cells in (self.heads, *self.rows)]


class Page(str):
    """A page: the string is its Markdown, and it keeps its tables."""

    tables: list[Table]

    def files(self, name: str) -> dict[str, str]:
        """Return the tables as files: <name>.tex with all of them, and a CSV each, numbered where several."""
        if not self.tables:
            return {}
        numbered = [f"-{i}" for i in range(1, len(self.tables) + 1)] if len(self.tables) > 1 else [""]
        sheets = {f"{name}{number}.csv": table.csv() for number, table in zip(numbered, self.tables, strict=True)}
        return {f"{name}.tex": "\n".join(table.latex() for table in self.tables), **sheets}


def _kept(line: str) -> str:
    """Return a line that LaTeX does not take for the argument, or the star, of the end of the line before."""
    return f"{{{line[0]}}}{line[1:]}" if line.startswith(("[", "*")) else line


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def page(*blocks: str) -> Page:
    """Return a page of headings, paragraphs and tables, an empty line between two of them."""
    made = Page("\n\n".join(blocks) + "\n")
    made.tables = [block for block in blocks if isinstance(block, Table)]
    return made


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return the YAML that stands above a page, for programs that read it."""
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False)}---"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> Table:
    """Return a table; `align` may leave out `l` at its end.

    Raises:
        ValueError: a row has not as many cells as the table has columns.
    """
    wrong = [row for row in rows if len(row) != len(heads)]
    if wrong:
        raise ValueError(f"{wrong[0]} has {len(wrong[0])} cells, the table has the columns {', '.join(heads)}")
    return Table(heads, rows, align.ljust(len(heads), "l"))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
