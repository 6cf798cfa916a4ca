"""Train the runs behind a figure, and draw it from what they left.

    python scripts/figures.py chains run                          # every panel and line; finished runs are kept
    python scripts/figures.py chains run panels="length 10"       # one panel
    python scripts/figures.py chains draw                         # the figure and its table, from the committed curves

A figure is results/<name>/study.yaml: lines (experiments), panels (overrides), a metric and a split. `run` writes
results/<name>/curves.json, one entry per run, after each of them; `draw` reads nothing else and writes
results/<name>/curves.png and curves.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scripts import studies, training  # noqa: E402

KEPT = ("label", "overrides", "scale", "seed", "num_parameters", "steps", "cpu_seconds")
KEPT += ("device", "versions", "commit", "dirty", "started", "finished")


def main(arguments: list[str]) -> None:
    """Run or draw a figure: its name, `run` or `draw`, and for `run` panels=<name,name,...>."""
    known = [name for name in studies.names() if "figure" in studies.load(name)]
    if len(arguments) < 2 or arguments[0] not in known or arguments[1] not in ("run", "draw"):
        sys.exit(f"error: name a figure, one of {', '.join(known)}, then run or draw\n{__doc__}")
    name, action, *rest = arguments
    figure = studies.load(name)["figure"]
    wanted = [item.removeprefix("panels=").split(",") for item in rest if item.startswith("panels=")]
    panels = {panel["name"]: panel for panel in figure["panels"]}
    unknown = [item for item in rest if not item.startswith("panels=")] + [
        panel for panel in (wanted[0] if wanted else []) if panel not in panels
    ]
    if unknown or (rest and action == "draw"):
        sys.exit(f"error: {' '.join(unknown or rest)}: allowed is run panels=<one or more of {', '.join(panels)}>")
    folder = ROOT / "results" / name
    if action == "run":
        run(figure, wanted[0] if wanted else list(panels), folder)
    draw(figure, entries_of(folder), folder)


def run(figure: dict[str, Any], panels: list[str], folder: Path) -> None:
    """Train every line of the panels, and write the entries anew after each."""
    for panel in [panel for panel in figure["panels"] if panel["name"] in panels]:
        for line in figure["lines"]:
            job = [f"experiment={line['experiment']}", *figure["overrides"], *panel["overrides"]]
            _, _, place = training.plan(job)
            record = training.train(job, place)
            entry = {"panel": panel["name"], "line": line["name"], **{key: record[key] for key in KEPT}}
            epochs, values = training.curve(place, figure["split"], figure["metric"])
            entry |= {"metric": figure["metric"], "split": figure["split"], "epochs": epochs, "values": values}
            entries = {(old["panel"], old["line"]): old for old in entries_of(folder)}
            entries[panel["name"], line["name"]] = entry
            write(list(entries.values()), folder)
            print(f"{panel['name']}, {line['name']}: best {max(values):.2f}, last {values[-1]:.2f}", flush=True)


def entries_of(folder: Path) -> list[dict[str, Any]]:
    """Return the runs recorded in `folder`, none where nothing has been run."""
    path = folder / "curves.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def write(entries: list[dict[str, Any]], folder: Path) -> None:
    """Write the runs, one a line: curves of hundreds of values would fill as many lines each."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "curves.tmp"
    temporary.write_text('{"runs": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n]}\n")
    temporary.replace(folder / "curves.json")


def table(figure: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """Return the numbers of the figure as Markdown: last and best value of every run; -- means not run."""
    panels = [panel["name"] for panel in figure["panels"]]
    lines = [
        f"# {figure['title']}",
        "",
        "Last value, in brackets the best and the epoch it was first reached (from 0); -- means not run.",
        "",
        "| | " + " | ".join(panels) + " |",
        "| --- |" + " --- |" * len(panels),
    ]
    found = {(entry["panel"], entry["line"]): entry for entry in entries}
    for line in figure["lines"]:
        cells = [_cell(found.get((panel, line["name"]))) for panel in panels]
        lines.append(f"| {line['name']} | " + " | ".join(cells) + " |")
    commits = sorted({(entry["commit"] or "none")[:8] for entry in entries})
    lines += ["", f"Commit {', '.join(commits) or '--'}. The curves are in `curves.json`, drawn in `curves.png`."]
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "--"
    values = entry["values"]
    top = max(values)
    return f"{values[-1]:.1f} ({top:.1f}, {entry['epochs'][values.index(top)]})"


def draw(figure: dict[str, Any], entries: list[dict[str, Any]], folder: Path) -> None:
    """Write the table and the figure: one panel beside the other, one line per estimator."""
    if not entries:
        sys.exit(f"error: {folder / 'curves.json'} holds no run: train them with `figures.py {folder.name} run`")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    text = table(figure, entries)
    (folder / "curves.md").write_text(text)
    panels = figure["panels"]
    canvas, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    names = [line["name"] for line in figure["lines"]]
    for axis, panel in zip(axes[0], panels, strict=True):
        for entry in entries:
            if entry["panel"] == panel["name"]:
                place = names.index(entry["line"])  # the first line lies on top
                style = {"color": f"C{place}", "zorder": 3 - 0.1 * place, "linewidth": 1.2}
                axis.plot(entry["epochs"], entry["values"], label=entry["line"], **style)
        axis.set(title=panel["name"], xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"{figure['split']} {figure['metric']}")
    handles = {handle.get_label(): handle for axis in axes[0] for handle in axis.get_lines()}
    canvas.legend(
        [handles[name] for name in names if name in handles],
        [name for name in names if name in handles],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )
    canvas.savefig(folder / "curves.png", dpi=120)
    pyplot.close(canvas)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
