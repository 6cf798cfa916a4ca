"""The page and the heat maps of a sweep of train.py, from the sweep.json that it leaves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.reporting import markdown, plots, tables

HEADS = {"best": "best", "last": "last", "seconds": "seconds", "step_ms": "ms per step", "cosine": "cosine"}


def page(content: Mapping[str, Any]) -> str:
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
        markdown.table([*keys, *(HEADS[name] for name in shown)], rows, "l" * len(keys) + "r" * len(shown)),
    ]
    if content["failed"]:
        failed = [
            [" ".join(f"{key}={value}" for key, value in job["values"].items()), job["reason"].replace("|", "\\|")]
            for job in content["failed"]
        ]
        blocks += ["## Failed", markdown.table(["job", "reason"], failed)]
    return markdown.page(*blocks)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draw the best value, and the cosine where it was measured, as maps over the last two keys.

    Every choice of the other keys is a column of maps. A point without a run is white.
    """
    shown = [name for name in ("best", "cosine") if any(row[name] for row in content["rows"])]
    *others, down, across = ["", "", *content["keys"]][-max(2, len(content["keys"])) :]
    axes = {key: _choices(content["rows"], key) for key in (*others, down, across)}
    settings = list(itertools.product(*(axes[key] for key in others)))
    wide = 1.2 + 0.8 * len(axes[across])
    canvas, panels = plots.canvas(len(shown), len(settings), width=wide, height=1.2 + 0.6 * len(axes[down]))
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
            title = " ".join(f"{key}={value}" for key, value in zip(others, setting, strict=True))
            shown_name = f"best {content['split']} {content['metric']}" if name == "best" else name
            panel.set(xlabel=across, ylabel=down, title=f"{shown_name} {title}".strip())
            panel.set_xticks(range(len(axes[across])), axes[across])
            panel.set_yticks(range(len(axes[down])), axes[down])
        canvas.colorbar(image, ax=line.tolist())
    plots.save(canvas, path)


def _choices(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the values of a key, in the order of the sweep; an axis that is missing has one empty value."""
    return list(dict.fromkeys(row["values"].get(key, "") for row in rows))


def _place(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(row["values"].get(key, "") for key in keys)
