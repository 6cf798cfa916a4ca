"""Tables of runs that stop at a target: how long each recipe trains until then, and whether it gets there."""

from __future__ import annotations

from typing import Any

from scripts.reporting import markdown, provenance, tables

HEADS = ("row", "reached", "seconds", "best", "record of the best", "steps", "accuracy then", "with evaluations, s")
HEADS += ("card", "precision", "budget", "commit", "command")


def render(table: dict[str, Any]) -> markdown.Page:
    """Return the page of a table with a `target`."""
    about = (
        f"Wall clock of training until the first evaluation with {table['metric']} >= {table['target']:g} on "
        f"`{table['split']}`, from the first step, over all restarts, the time to compile included; evaluations and "
        f"the checkpoints after them are outside the clock. mean ± {table['std']} std (n runs), of the runs that got "
        "there; `reached`: how many did. Smaller budgets are labelled; * marks uncommitted changes; -- means not run, "
        "or not reached."
    )
    rows = [[row["name"], *_cells(table, row)] for row in table["rows"]]
    return markdown.page(f"# {table['title']}", about, markdown.table(HEADS, rows))


def _cells(table: dict[str, Any], row: dict[str, Any]) -> list[str]:
    scale, records = tables.records_of(row["experiment"])
    records = [record for record in records if record.get("target") == table["target"]]
    if not records:
        return ["--"] * (len(HEADS) - 1)
    found = sorted((record for record in records if record["reached"]), key=lambda record: record["training_seconds"])
    label = tables.label_of(scale, records)
    cells = [f"{len(found)} of {len(records)}{label}"]
    cells.append(tables.cell([record["training_seconds"] for record in found], table["std"], label))
    shown = found or records
    metrics = [record["best"][table["split"]][table["metric"]] for record in found]
    return [
        *cells,
        f"{found[0]['training_seconds']:.2f}" if found else "--",
        f"{row['experiment']}, seed {found[0]['seed']}" if found else "--",
        _range([record["steps"] for record in found], ".0f"),
        _range(metrics, ".2f"),
        _range([record["wall_seconds"] for record in found], ".0f"),
        ", ".join(sorted({f"{record['world_size']} x {record['device']}" for record in shown})),
        ", ".join(sorted({tables.precision(record) for record in shown})),
        _budget(scale, [record["steps"] for record in records if not record["reached"]]),
        provenance.commits(records),
        f"`{provenance.command(shown[0])}`",
    ]


def _budget(scale: str, spent: list[int]) -> str:
    """Return the scale, and the steps of the runs that spent all of theirs: the others have not told how many."""
    return f"{scale}, {max(spent)} steps at most" if spent else scale


def _range(values: list[float], form: str) -> str:
    """Return the smallest and the greatest value, one where they are the same, and -- where there is none."""
    ends = list(dict.fromkeys(format(value, form) for value in (min(values), max(values)))) if values else ["--"]
    return " to ".join(ends)
