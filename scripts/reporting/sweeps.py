"""The page and the heat maps of a sweep of train.py, from the sweep.json that it leaves."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.reporting import markdown, plots, tables

HEADS = {"best": "best", "last": "last", "seconds": "seconds", "step_ms": "ms per step", "cosine": "cosine"}
FIELDS = ("command", "metric", "split", "mode", "keys", "rows", "failed")
LONGEST = 24  # characters of a label on the axis of a map


def read(path: Path) -> dict[str, Any]:
    """Return what a sweep has left.

    Raises:
        ValueError: the file is damaged, or no sweep.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run the sweep again, its finished jobs are kept") from error
    lacking = [name for name in FIELDS if name not in content] if isinstance(content, dict) else FIELDS
    if lacking:
        raise ValueError(f"{path} is no sweep of train.py: it has no {', '.join(lacking)}")
    return content


def page(content: Mapping[str, Any]) -> markdown.Page:
    """Return the page: a row per point, its seeds averaged, and the jobs that failed with their reasons."""
    keys = content["keys"]
    shown = [name for name in HEADS if any(row[name] for row in content["rows"])]
    rows = [
        [*(row["values"][key] for key in keys), *(tables.cell(row[name], "sample") for name in shown)]
        for row in content["rows"]
    ]
    blocks = [
        f"# Sweep over {', '.join(keys) or 'seeds'}",
        f"`{content['command']}`",
        f"`best` and `last`: the best and the last {content['metric']} of a run on `{content['split']}`; mean ± sample "
        "std (n seeds). `seconds` is the wall clock of a run with its evaluations; `cosine` is that of its gradient to "
        "the exact one, the mean over what its monitor measured.",
    ]
    if rows:
        heads = [*keys, *(HEADS[name] for name in shown)]
        blocks.append(markdown.table(heads, rows, "l" * len(keys) + "r" * len(shown)))
    if not drawn(content):
        blocks.append(f"No job has a value on `{content['split']}`: there is no map to draw.")
    if content["failed"]:
        failed = [
            [" ".join(f"{key}={value}" for key, value in job["values"].items()), job["reason"]]
            for job in content["failed"]
        ]
        blocks += ["## Failed", markdown.table(["job", "reason"], failed)]
    return markdown.page(*blocks)


def drawn(content: Mapping[str, Any]) -> list[str]:
    """Return the values that have a map: the best one, and the cosine where it was measured."""
    return [name for name in ("best", "cosine") if any(row[name] for row in content["rows"])]


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draw what `drawn` names, of which there must be something, as maps over the last two keys.

    Every choice of the other keys is a column of maps. A point without a run is white.
    """
    shown = drawn(content)
    *others, down, across = ["", "", *content["keys"]][-max(2, len(content["keys"])) :]
    axes = {key: _choices(content["rows"], key) for key in (*others, down, across)}
    settings = list(itertools.product(*(axes[key] for key in others)))
    ticks = {key: _short(axes[key]) for key in (down, across)}
    beside, below = (max(map(len, ticks[key])) for key in (down, across))
    wide, slanted = 1.2 + 0.8 * len(axes[across]) + 0.07 * beside, below > 8
    high = 1.5 + 0.6 * len(axes[down]) + 0.13 * len(others) + (0.05 * below if slanted else 0)
    canvas, panels = plots.canvas(len(shown), len(settings), width=wide, height=high)
    for name, line in zip(shown, panels, strict=True):
        found = {_place(row, (*others, down, across)): fmean(row[name]) for row in content["rows"] if row[name]}
        reverse = name == "best" and content["mode"] == "min"
        style = {"vmin": min(found.values()), "vmax": max(found.values()), "cmap": f"viridis{'_r' * reverse}"}
        for setting, panel in zip(settings, line, strict=True):
            values = [[found.get((*setting, y, x), float("nan")) for x in axes[across]] for y in axes[down]]
            image = panel.imshow(values, aspect="auto", **style)
            panel.grid(visible=False)
            for (i, row), j in itertools.product(enumerate(values), range(len(axes[across]))):
                if row[j] == row[j]:
                    box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
                    panel.text(j, i, f"{row[j]:.3g}", ha="center", va="center", fontsize=8, bbox=box)
            shown_name = f"best {content['split']} {content['metric']}" if name == "best" else name
            title = [shown_name, *(f"{key}={value}" for key, value in zip(others, setting, strict=True))]
            # as wide as its panel, or it lies on the title beside it
            lines = [line for part in title for line in textwrap.wrap(part, int(11 * wide))]
            panel.set_title("\n".join(lines), fontsize=8)
            panel.set(xlabel=across, ylabel=down)
            slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
            panel.set_xticks(range(len(axes[across])), ticks[across], fontsize=8, **slant)
            panel.set_yticks(range(len(axes[down])), ticks[down], fontsize=8)
        canvas.colorbar(image, ax=line.tolist())
    plots.save(canvas, path)


def _short(labels: Sequence[str]) -> list[str]:
    """Return labels that leave room for the map: without the folders that all share, and without their middle."""
    folder = labels[0].rpartition("/")[0] + "/"
    if folder != "/" and all(label.startswith(folder) for label in labels):
        labels = [label.removeprefix(folder) for label in labels]
    half = (LONGEST - 1) // 2
    cut = [label if len(label) <= LONGEST else f"{label[:half]}…{label[-half:]}" for label in labels]
    return cut if len(set(cut)) == len(cut) else list(labels)


def _choices(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the values of a key, in the order of the sweep; an axis that is missing has one empty value."""
    return list(dict.fromkeys(row["values"].get(key, "") for row in rows))


def _place(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(row["values"].get(key, "") for key in keys)
