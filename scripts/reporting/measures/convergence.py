"""Theorem 2 of the paper: the page and the figure."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.reporting import claims, markdown, plots

FLOOR = 1e-16
SHOWN = (1, 2, 4, 8, 16, 30, 100, 200)


def page(record: dict[str, Any]) -> markdown.Page:
    """Return the page."""
    settings = record["settings"]
    lams, ks = settings["lams"], settings["ks"]
    rates = []
    for lam in lams:
        found = [row["rate"] for row in _rows(record, "NPG", "exact", lam)]
        of = [one for one in record["damped"] if one["lam"] == lam]
        cells = (found, [one["radius"] for one in of], [one["norm"] for one in of])
        rates.append([f"{lam:g}", *(f"{fmean(values):.3f}" for values in cells)])
    places = [i for i, k in enumerate(ks) if k in SHOWN]
    conditions = [[f"{one['lam']:g}", *(f"{one['mean'][i]:.2f}" for i in places)] for one in record["conditioning"]]
    about = (
        f"One tanh layer of {settings['dim']} units, the spectral norm of W {settings['spectral_norm']:g}, "
        f"{len(settings['seeds'])} seeds. Relative error, in the spectral norm, of the phantom Jacobian of the "
        f"equilibrium to the input; an inexact start is {settings['start_steps']} plain iterations from zero. The "
        "errors are in `theorem2.json`, drawn in `theorem2.png`."
    )
    return claims.page(
        record,
        "Theorem 2: phantom gradients tend to the exact one",
        about,
        "## Rate of convergence, mean over seeds",
        markdown.table(["lam", "measured rate", "radius of B", "norm of B"], rates, "rrrr"),
        "## Condition number of lam (I + B + ... + B^(k-1)), mean over seeds",
        markdown.table(["lam", *(f"k={ks[i]}" for i in places)], conditions, "r" * (1 + len(places))),
        f"That of the inverse of I - J, the limit for every lam, is {record['conditioning_limit']:.2f} on average. The "
        "paper says (Section 2.4) that a large k impairs the conditioning and that a small lam helps. That is no law, "
        "and is only shown here.",
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the errors from an exact start, those from an inexact one, and the conditioning."""
    settings = record["settings"]
    lams, ks = settings["lams"], settings["ks"]
    figure, axes = plots.canvas(1, 3)
    exact, inexact, conditions = axes[0]
    for lam, color in zip(lams, plots.shades(len(lams)), strict=True):
        exact.plot(ks, _mean(record, "NPG", "exact", lam), color=color, label=f"lam = {lam:g}")
        radii = [one["radius"] for one in record["damped"] if one["lam"] == lam]
        exact.plot(ks, [fmean(radius**k for radius in radii) for k in ks], color=color, linestyle=":")
        inexact.plot(ks, _mean(record, "UPG", "inexact", lam), color=color)
        inexact.plot(ks, _mean(record, "NPG", "inexact", lam), color=color, linestyle="--")
        (values,) = [one["mean"] for one in record["conditioning"] if one["lam"] == lam]
        conditions.plot(ks, values, color=color)
    conditions.axhline(record["conditioning_limit"], color="black", linestyle=":", label="of the inverse of I - J")
    for axis, title in zip(
        axes[0],
        (
            "(i) from the equilibrium; dotted: radius of B to the k",
            "(ii) from an inexact start: UPG, dashed NPG",
            "condition number of the Neumann matrix",
        ),
        strict=True,
    ):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("k")
    for axis in (exact, inexact):
        axis.set(yscale="log", ylim=(FLOOR, 3), ylabel="relative error of the Jacobian")
    conditions.set(xscale="log", ylabel="condition number, mean over seeds")
    exact.legend(fontsize=8, loc="upper right")
    conditions.legend(fontsize=8, loc="lower right")
    plots.save(figure, path)


def _rows(record: dict[str, Any], estimator: str, start: str, lam: float) -> list[dict[str, Any]]:
    place = (estimator, start, lam)
    return [row for row in record["rows"] if (row["estimator"], row["start"], row["lam"]) == place]


def _mean(record: dict[str, Any], estimator: str, start: str, lam: float) -> list[float]:
    found = [row["error"] for row in _rows(record, estimator, start, lam)]
    return [max(FLOOR, fmean(column)) for column in zip(*found, strict=True)]
