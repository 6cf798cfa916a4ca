"""Figures of curves: panels beside each other, a line per experiment; and their numbers as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.reporting import markdown, plots, provenance
from scripts.reporting.tables import other_precisions


def table(figure: dict[str, Any], entries: list[dict[str, Any]]) -> markdown.Page:
    """Return the page of the figure's numbers: last and best value of every run; -- means not run."""
    panels = [panel["name"] for panel in figure["panels"]]
    about = "Last value, in brackets the best and the epoch it was first reached (from 0); -- means not run."
    found = {(entry["panel"], entry["line"]): entry for entry in entries}
    rows = [[line["name"], *(_cell(found.get((panel, line["name"]))) for panel in panels)] for line in figure["lines"]]
    # early entries do not know their precision
    precisions = other_precisions([entry for entry in entries if entry.get("precision") is not None])
    ran = f" Precision {', '.join(precisions)}." if precisions else ""
    drawn = "The curves are in `curves.json`, drawn in `curves.png`."
    source = f"{provenance.commit_line(entries)}{ran} {drawn}"
    return markdown.page(f"# {figure['title']}", about, markdown.table(["", *panels], rows), source)


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "--"
    values = entry["values"]
    top = max((value for value in values if value is not None), default=None)  # null: not finite
    last = "not finite" if values[-1] is None else f"{values[-1]:.1f}"
    return last if top is None else f"{last} ({top:.1f}, {entry['epochs'][values.index(top)]})"


def draw(figure: dict[str, Any], entries: list[dict[str, Any]], path: Path) -> None:
    """Draw the figure into `path`."""
    panels = figure["panels"]
    canvas, axes = plots.canvas(1, len(panels), width=3.2, height=3.2, sharey=True)
    names = [line["name"] for line in figure["lines"]]
    for axis, panel in zip(axes[0], panels, strict=True):
        for entry in entries:
            if entry["panel"] == panel["name"]:
                place = names.index(entry["line"])  # the first line lies on top
                style = {"color": f"C{place}", "zorder": 3 - 0.1 * place, "linewidth": 1.2}
                axis.plot(entry["epochs"], entry["values"], label=entry["line"], **style)
        axis.set(title=panel["name"], xlabel="epoch")
    axes[0][0].set_ylabel(f"{figure['split']} {figure['metric']}")
    handles = {handle.get_label(): handle for axis in axes[0] for handle in axis.get_lines()}
    canvas.legend(
        [handles[name] for name in names if name in handles],
        [name for name in names if name in handles],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )
    plots.save(canvas, path)
