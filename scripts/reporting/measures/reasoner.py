"""The page and the figure of the gradients of a recursive reasoner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.reporting import claims, markdown, plots


def page(record: dict[str, Any]) -> markdown.Page:
    """Return the page."""
    rows, settings = record["rows"], record["settings"]
    rules = list(rows[0]["cosine"])

    def table(name: str, form: str, *more: str) -> markdown.Table:
        cells = [
            [
                _place(row),
                *(_number(row[name][rule], form) for rule in rules),
                *(_number(row[key], ".2g") for key in more),
            ]
            for row in rows
        ]
        heads = ["weights, supervision step", *rules, *(key.replace("_", " ") for key in more)]
        return markdown.table(heads, cells, "l" + "r" * (len(heads) - 1))

    about = (
        f"`experiment={settings['experiment']}`, {settings['cycles']} cycles a supervision step, the first batch of "
        "training in float64. Gradients are those of all parameters before the heads, after so many supervision "
        "steps. Weights are random, as a run begins with them, or those that ship under the name given. Spectral "
        "radius and relative residual are those of one cycle before the last, the mean of eight puzzles. Implicit "
        f"differentiation solves its backward by {settings['implicit_steps']} Broyden steps; a puzzle without a "
        "solution has the gradient of the last cycle."
    )
    return claims.page(
        record,
        "Gradients of a recursive reasoner, by the rule that makes them",
        about,
        "## Cosine to the gradient through all cycles",
        table("cosine", ".2f", "spectral_radius", "residual"),
        "## Norm over that of the gradient through all cycles",
        table("norm_ratio", ".2g"),
        heading="What was measured",
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the cosines against the supervision step, a panel per weights."""
    weights = list(dict.fromkeys(row["weights"] for row in record["rows"]))
    figure, axes = plots.canvas(1, len(weights), height=3.8, sharey="row")
    for axis, name in zip(axes[0], weights, strict=True):
        rows = [row for row in record["rows"] if row["weights"] == name]
        for rule in rows[0]["cosine"]:
            steps = [row["supervision_step"] for row in rows]
            axis.plot(steps, [row["cosine"][rule] for row in rows], marker="o", markersize=4, label=rule)
        axis.set(title=name, xlabel="supervision step", xscale="log")
        axis.set_xticks(steps, map(str, steps))
        axis.minorticks_off()
    axes[0][0].set_ylabel("cosine to the gradient through all cycles")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    plots.save(figure, path)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _place(row: dict[str, Any]) -> str:
    return f"{row['weights']}, {row['supervision_step']}"
