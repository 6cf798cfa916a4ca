"""The report: one page that holds all tables, figures and runs, and needs neither a server nor a network."""

from __future__ import annotations

import base64
import gzip
import html
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from plotly.offline import get_plotlyjs

from scripts import studies
from scripts.reporting import pages
from scripts.reporting.html.payload import name_of, payload

HERE = Path(__file__).parent
DEFAULT = Path("report.html")
# headings of a study's page stand below that of its section
LOWER = {"h1": "h3", "h2": "h4"}


def render(runs: Path | None) -> str:
    """Return the report as HTML; `runs` is a folder of run folders, which join the committed records."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    # a browser reads neither NaN nor Infinity, and would show nothing at all
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    return environment.get_template("page.html.j2").render(
        studies=[section(studies.load(name)) for name in studies.names()],
        payload=payload(runs),
        library=library,  # compressed, which takes a third of its room
        style=(HERE / "page.css").read_text("utf-8"),
        script=(HERE / "page.js").read_text("utf-8"),
    )


def write(path: Path, runs: Path | None) -> None:
    """Write the report of `render` to `path`, and the folders above it."""
    text = render(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def section(study: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a study: its rendered pages and figures, its command and its records."""
    found = pages.of(study)
    figures = [(path.stem, path.with_suffix(".png")) for path in found if path.with_suffix(".png").exists()]
    return {
        "id": study["name"].replace("/", "-"),
        "name": study["name"],
        "title": study["title"],
        "command": pages.command(study),
        "records": [name_of(path) for path in records(study)],
        "pages": [as_html(text) for text in found.values()],
        "figures": [
            {"name": name, "data": base64.b64encode(path.read_bytes()).decode(), "title": _title(found, name)}
            for name, path in figures
        ],
    }


def records(study: dict[str, Any]) -> list[Path]:
    """Return the records of a study: those in its folder, and those of the experiments that its tables name."""
    inside = set(study["folder"].rglob("*.json"))
    rows = [row for table in study.get("tables", {}).values() for row in table["rows"]]
    for row in rows:
        place = studies.results() / row["experiment"]
        inside.update(place.parent.glob(f"{place.name}*/*.json"))
    return sorted(inside)


def as_html(text: str) -> str:
    """Return a rendered page as HTML; tables scroll on a narrow screen, and are named by the heading before them."""
    text = re.sub(r"\[([^]]*)\]\((?!https://|#)[^)]*\)", r"\1", text)  # to pages that do not lie beside this one
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens, heading = parser.parse(text), "table"
    for before, token in pairwise([Token("", "", 0), *tokens]):
        token.tag = LOWER.get(token.tag, token.tag)
        if before.type == "heading_open":
            heading = "".join(part.content for part in token.children or ())
        if token.type == "table_open":
            token.meta["heading"] = heading
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return parser.renderer.render(tokens, parser.options, {})


def _table_open(_: Any, tokens: Sequence[Token], place: int, *__: Any) -> str:
    """Return the frame of a table: a group, for as many landmarks as there are tables lead nowhere."""
    name = html.escape(tokens[place].meta["heading"])
    return f'<div class="scroll" role="group" tabindex="0" aria-label="{name}"><table>\n'


def _title(found: Mapping[Path, str], name: str) -> str:
    (text,) = [text for path, text in found.items() if path.stem == name]
    return text.splitlines()[0].lstrip("# ")
