"""Figure 2: the cosine of phantom gradients to the exact gradient along a training by implicit differentiation."""

from __future__ import annotations

from math import inf
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from scripts.reporting import markdown, plots
from scripts.reporting.grids.runs import Runs, source

WINDOWS = 10
PREFIX = "gradient_cosine/"


def page(grid: dict[str, Any], runs: Runs) -> markdown.Page:
    """Return the page: median and spread of cosine and norm ratio in every tenth of the training."""
    names = _names(runs)
    heads = ["steps", "batches", *(f"cosine of {name.upper()}" for name in names)]
    heads += [f"norm ratio of {name.upper()}" for name in names] + ["adjoint residual", "images above 0.01"]
    rows = [
        [
            *(span, str(len(part))),
            *(_cell(part, f"{kind}/{name}") for kind in KINDS for name in names),
            *_exactness(part),
        ]
        for span, part in _windows(runs)
    ]
    about = (
        "Every few steps of a training by implicit differentiation, the gradient of the same batch by each phantom "
        "gradient (k = 5, lam = 0.5) and by the exact adjoint, over the parameters before the equilibrium: median, and "
        "in brackets the 10th and the 90th percentile over the batches. A norm ratio below 1 is a shorter gradient. "
        "How exact the exact one is: the residual of its adjoint equation, relative to the cotangent (the 90th "
        "percentile over the images of a batch, median over the batches), and how many of the images are above 0.01 "
        f"(mean over the batches).{_pretrained(runs)}"
    )
    table = markdown.table(heads, rows or [["--"] * len(heads)], "l" + "r" * (len(heads) - 1))
    return markdown.page(f"# {grid['title']}{runs.label}", about, table, source(runs))


KINDS = ("gradient_cosine", "gradient_norm_ratio")


def draw(grid: dict[str, Any], runs: Runs, path: Path) -> None:
    """Draw the cosine against the step with its median and spread, and beside it its distribution over all steps."""
    canvas, axes = plots.canvas(1, 2, sharey=True)
    along, spread = axes[0]
    for color, name in zip(("C0", "C1", "C2", "C3"), _names(runs), strict=False):
        key = PREFIX + name
        points = [(row["step"], row[key]) for row in _rows(runs) if row[key] is not None]
        along.scatter(*zip(*points, strict=True), s=4, color=color, alpha=0.3, linewidths=0)
        windows = [[row for row in part if row[key] is not None] for _, part in _windows(runs)]
        windows = [part for part in windows if part]
        x = [median(row["step"] for row in part) for part in windows]
        low, middle, high = zip(*(_percentiles([row[key] for row in part]) for part in windows), strict=True)
        along.plot(x, middle, color=color, label=f"{name.upper()}, k = 5, lam = 0.5")
        along.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        spread.hist([cosine for _, cosine in points], bins=30, orientation="horizontal", color=color, alpha=0.5)
    along.axhline(0, color="black", linewidth=0.8)
    along.set(xlabel="step of training", ylabel="cosine to the exact gradient", title="along the training")
    spread.set(xlabel="batches", title="over all steps")
    spread.xaxis.get_major_locator().set_params(integer=True)
    along.legend(loc="upper left", frameon=False)
    canvas.suptitle(f"MDEQ-Tiny trained by implicit differentiation{runs.label}", fontsize=10)
    plots.save(canvas, path)


def _rows(runs: Runs) -> list[dict[str, Any]]:
    return [row for record in runs.records for row in record["monitor"]]


def _names(runs: Runs) -> list[str]:
    """Return the estimators that were compared, as the monitor names them."""
    return sorted({key.removeprefix(PREFIX) for row in _rows(runs) for key in row if key.startswith(PREFIX)})


def _windows(runs: Runs) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (first to last step, rows) of equal parts of the training that have any."""
    rows = _rows(runs)
    if not rows:
        return []
    total = max(record["steps"] for record in runs.records)
    found = []
    for i in range(WINDOWS):
        first, last = 1 + total * i // WINDOWS, total * (i + 1) // WINDOWS
        part = [row for row in rows if first <= row["step"] <= last]
        found += [(f"{first} to {last}", part)] if part else []
    return found


def _pretrained(runs: Runs) -> str:
    """Return a sentence on the batches that the run itself did not train on by the gradient of an equilibrium."""
    steps = [row["step"] for row in _rows(runs) if row.get("pretraining")]
    return f" Up to step {max(steps)} the run itself trains by unrolling, its pretraining." if steps else ""


def _exactness(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the residual of the exact adjoint and the share above 0.01, which older records do not have."""
    known = [row for row in rows if "exact_residual" in row]
    if not known:
        return "--", "--"
    unsolved = fmean(row["exact_unsolved"] for row in known)
    residuals = [inf if row["exact_residual"] is None else row["exact_residual"] for row in known]  # null: not finite
    return f"{median(residuals):.1e}", f"{100 * unsolved:.1f} %"


def _cell(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return "--"
    low, middle, high = _percentiles(values)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], median(values), tenths[-1]
