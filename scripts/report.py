"""Render the tables of the paper from committed records, and from nothing else.

    python scripts/report.py            # every table of configs/report into results/<table>.md
    python scripts/report.py table1

Records lie in results/<experiment>/: one <seed or fold>.json per run at the paper's budget, and <name>@<scale>/ for
smaller budgets, which a cell shows with its label. A cell is mean ± std (n); a row without a record prints --. A table
with `protocols` shows results/<experiment>.json, the record of ten folds.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SCALES = ("paper", "gpu", "smoke")


def records_of(experiment: str) -> tuple[str, list[dict[str, Any]]]:
    """Return (scale, records) of an experiment at the largest budget that has any."""
    for scale in SCALES:
        folder = ROOT / "results" / (experiment if scale == "paper" else f"{experiment}@{scale}")
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        if records:
            return scale, records
    return "paper", []


def cell(values: list[float], std: str) -> str:
    """Return `mean ± std (n)`; `std` is sample or population."""
    if not values:
        return "--"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f} (1)"
    spread = statistics.stdev(values) if std == "sample" else statistics.pstdev(values)
    return f"{mean:.2f} ± {spread:.2f} ({len(values)})"


def render(table: dict[str, Any]) -> str:
    """Return the table as Markdown: the paper's number, ours by the paper's protocol, and the honest one."""
    metric, split, std = table["metric"], table["split"], table["std"]
    lines = [
        f"# {table['title']}",
        "",
        f"`best`: the best evaluation of a run on `{split}`, as the paper reports; `last`: its last one. "
        f"mean ± {std} std (n runs). Smaller budgets are labelled; -- means not run. "
        "Peak memory is that allocated on a GPU, or resident for the whole process on a CPU.",
        "",
        "| row | paper | best | last | budget | parameters | step ms | peak MB | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table["rows"]:
        scale, records = records_of(row["experiment"])
        best = [record["best"][split][metric] for record in records]
        last = [record["final"][split][metric] for record in records]
        steps = [1e3 * record["times"]["step"]["median"] for record in records if "step" in record["times"]]
        peaks = [record["peak_memory"] / 1e6 for record in records]
        facts = [
            f"{scale}, {records[0]['steps']} steps" if records else "--",
            f"{records[0]['num_parameters']:,}" if records else "--",
            f"{statistics.median(steps):.1f} on {records[0]['device']}" if steps else "--",
            f"{max(peaks):,.0f}" if peaks else "--",
            ", ".join(sorted({(record["commit"] or "none")[:8] for record in records})) or "--",
        ]
        cells = [row["name"], row["paper"], cell(best, std), cell(last, std), *facts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def render_folds(table: dict[str, Any]) -> str:
    """Return the table of ten folds as Markdown: the paper's number, and ours by every protocol of scripts/folds.py."""
    protocols = table["protocols"]
    lines = [
        f"# {table['title']}",
        "",
        "mean ± population std. The paper chooses the best test epoch of each fold, which is optimistic; an epoch "
        "chosen by the other folds, or by validation graphs held out of training, is not. * marks uncommitted changes; "
        "-- means not run.",
        "",
        f"| row | paper | {' | '.join(protocols.values())} | folds | parameters | CPU s per fold | commit |",
        "| --- | --- |" + " --- |" * (len(protocols) + 4),
    ]
    for row in table["rows"]:
        path = ROOT / "results" / f"{row['experiment']}.json"
        cells = [row["name"], row["paper"]]
        if path.exists():
            record = json.loads(path.read_text())
            cells += [_protocol(record["protocols"].get(name)) for name in protocols]
            seconds = record["cpu_seconds"]
            cells += [
                str(len(record["folds"])),
                f"{record['num_parameters']:,}",
                f"{seconds['mean']:.0f} ({seconds['min']:.0f} to {seconds['max']:.0f})" if seconds else "--",
                ", ".join(commit[:8] for commit in record["commit"].split(", ")) + ("*" if record["dirty"] else ""),
            ]
        else:
            cells += ["--"] * (len(protocols) + 4)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _protocol(result: dict[str, Any] | None) -> str:
    return "--" if result is None else f"{result['mean']:.2f} ± {result['std']:.2f}"


def main(names: list[str]) -> None:
    """Render the named tables, or all."""
    known = {path.stem: path for path in sorted((ROOT / "configs" / "report").glob("*.yaml"))}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"error: no table {', '.join(unknown)}; choose from {', '.join(known)}")
    for name in names or known:
        table = yaml.safe_load(known[name].read_text())
        text = render_folds(table) if "protocols" in table else render(table)
        (ROOT / "results" / f"{name}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
