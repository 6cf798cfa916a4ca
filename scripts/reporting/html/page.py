"""The report: one page that holds all tables, figures and runs, and needs neither a server nor a network."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
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
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    return environment.get_template("page.html.j2").render(
        studies=[section(studies.load(name)) for name in studies.names()],
        payload=payload(runs),
        library=library,  # compressed, which takes a third of its room
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
    )


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
    inside = {path for path in study["folder"].rglob("*.json")}
    rows = [row for table in study.get("tables", {}).values() for row in table["rows"]]
    for row in rows:
        place = studies.results() / row["experiment"]
        inside |= {path for path in place.parent.glob(f"{place.name}*/*.json")}
    return sorted(inside)


def as_html(text: str) -> str:
    """Return a rendered page as HTML; tables scroll on a narrow screen."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for token in tokens:
        token.tag = LOWER.get(token.tag, token.tag)
    html = parser.renderer.render(tokens, parser.options, {})
    frame = '<div class="scroll" role="region" tabindex="0" aria-label="table"><table>'
    return html.replace("<table>", frame).replace("</table>", "</table></div>")


def _title(found: dict[Path, str], name: str) -> str:
    (text,) = [text for path, text in found.items() if path.stem == name]
    return text.splitlines()[0].lstrip("# ")
