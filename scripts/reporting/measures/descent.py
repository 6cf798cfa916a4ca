"""Theorem 3 of the paper: the page and the figure."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.reporting import claims, markdown, plots


def page(record: dict[str, Any]) -> markdown.Page:
    """Return the page."""
    settings = record["settings"]
    rows = []
    for k in (*settings["ks"], None):
        found = [row for row in record["rows"] if row["k"] == k]
        values = [fmean(row[key] for row in found) for key in ("eps", "radius")]
        values.append(fmean(row["mean"][-1] for row in found))
        rows.append([_name(k, settings["lam"]), *(f"{value:.3g}" for value in values)])
    about = (
        "SGD on a risk whose gradient is known exactly, with steps eta / sqrt(n) and a phantom gradient that is off by "
        f"at most eps: mean over {len(settings['seeds'])} seeds, N = {settings['steps']} steps. The weighted mean is "
        "sum eta_n |grad R|^2 / sum eta_n over all steps; the radius is the root mean square of |grad R| over the last "
        "tenth of them. The curves are in `theorem3.json`, drawn in `theorem3.png`."
    )
    heads = ["gradient", "eps, the largest error of a step", "radius", "weighted mean of the squares"]
    return claims.page(
        record,
        "Theorem 3: where SGD with a phantom gradient ends",
        about,
        "## By gradient",
        markdown.table(heads, rows, "lrrr"),
        "The radius of implicit differentiation is that of SGD itself after the same number of steps. What a phantom "
        "gradient adds to it falls with eps. In the right panel of the figure every seed is a grey line, the mean a "
        "point.",
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the weighted mean against N, and the radius against eps."""
    settings, n = record["settings"], record["n"]
    figure, axes = plots.canvas(1, 2)
    left, right = axes[0]
    names = (*settings["ks"], None)
    for k, color in zip(names, [*plots.shades(len(settings["ks"])), "black"], strict=True):
        found = [row for row in record["rows"] if row["k"] == k]
        mean = [fmean(column) for column in zip(*(row["mean"] for row in found), strict=True)]
        style = {"linestyle": "--"} if k is None else {}
        left.plot(n, mean, color=color, label=_name(k, settings["lam"]), **style)
        radius = fmean(row["radius"] for row in found)
        if k is None:
            right.axhline(radius, color=color, linestyle="--")
        else:
            eps = fmean(row["eps"] for row in found)
            right.scatter([eps], [radius], color=color, s=36, zorder=3)
    for seed in settings["seeds"]:
        one = [row for row in record["rows"] if row["seed"] == seed and row["k"] is not None]
        right.plot([row["eps"] for row in one], [row["radius"] for row in one], color="grey", linewidth=0.8, alpha=0.6)
    late = [i for i in n if i >= 10]
    scale = mean[-1] * math.sqrt(n[-1]) / math.log(n[-1])
    left.plot(
        late, [scale * math.log(i) / math.sqrt(i) for i in late], color="grey", linestyle=":", label="log N / sqrt(N)"
    )
    left.set(xscale="log", yscale="log", xlabel="N", ylabel="weighted mean of |grad R|$^2$")
    right.set(xscale="log", ylim=(0, 1.1 * max(row["radius"] for row in record["rows"])))
    right.set(xlabel="eps, the largest error of the gradient", ylabel="radius: |grad R| at the end")
    left.legend(fontsize=7)
    plots.save(figure, path)


def _name(k: int | None, lam: float) -> str:
    return "implicit differentiation" if k is None else f"NPG k={k} lam={lam:g}"
