"""The one writer of Markdown: pages made of paragraphs and tables, whose tables are written as CSV and LaTeX, too."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

RULE = re.compile(r"---:?")
# what LaTeX reads as something else; the backslash is first replaced by a mark
SPECIAL = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "|": r"$|$"},
    "\\": r"\textbackslash{}",
}


class Table(NamedTuple):
    """A table of a page.

    Args:
        align: a letter per column, `r` or `l`.
    """

    heads: list[str]
    rows: list[list[str]]
    align: str

    def csv(self) -> str:
        """Return the table as CSV, the heads in the first line."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.heads, *self.rows])
        return text.getvalue()

    def latex(self) -> str:
        """Return the table as a `tabular` of LaTeX, without any package."""
        lines = [_kept(" & ".join(map(_escaped, cells))) + r" \\" for cells in (self.heads, *self.rows)]
        lines.insert(1, r"\hline")
        return "\n".join([rf"\begin{{tabular}}{{{self.align}}}", *lines, r"\end{tabular}"]) + "\n"


def tables(text: str) -> list[Table]:
    """Return the tables of a page of this module, in order."""
    lines, found = text.splitlines(), []
    for i, line in enumerate(lines[1:], 1):
        rules = _cells(line) if line.startswith("|") else []
        if rules and all(map(RULE.fullmatch, rules)) and lines[i - 1].startswith("|"):
            rows = []
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(_cells(row))
            align = "".join("r" if rule.endswith(":") else "l" for rule in rules)
            found.append(Table(_cells(lines[i - 1]), rows, align))
    return found


def files(text: str, name: str) -> dict[str, str]:
    """Return the tables of a page as files: <name>.tex with all of them, and a CSV each, numbered where several."""
    found = tables(text)
    if not found:
        return {}
    numbered = [f"-{i}" for i in range(1, len(found) + 1)] if len(found) > 1 else [""]
    sheets = {f"{name}{number}.csv": table.csv() for number, table in zip(numbered, found, strict=True)}
    return {f"{name}.tex": "\n".join(table.latex() for table in found), **sheets}


def _cells(line: str) -> list[str]:
    """Return the cells of a line, without the marks of Markdown."""
    parts = re.split(r"(?<!\\)\|", line.strip()[1:-1])
    return [part.strip().replace("\\|", "|").replace("**", "").replace("`", "") for part in parts]


def _kept(line: str) -> str:
    """Return a line that LaTeX does not take for the argument, or the star, of the end of the line before."""
    return f"{{{line[0]}}}{line[1:]}" if line.startswith(("[", "*")) else line


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def page(*blocks: str) -> str:
    """Return a page of headings, paragraphs and tables, an empty line between two of them."""
    return "\n\n".join(blocks) + "\n"


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return the YAML that stands above a page, for programs that read it."""
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False)}---"


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
