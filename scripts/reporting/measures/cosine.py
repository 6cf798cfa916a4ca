"""Figure 1 of the paper: the page and the figure of measured cosines."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scripts.reporting import claims, markdown, plots

SHOWN = (1, 2, 3, 5, 9, 12)
NAMES = {"NPG": "(a) Neumann series, NPG", "UPG": "(b) unrolling, UPG"}


def page(record: dict[str, Any]) -> markdown.Page:
    """Return the page."""
    rows = record["rows"]
    longest = len(rows[0]["cosine"])
    ks = [k for k in SHOWN if k <= longest]
    settings, tables = record["settings"], []
    for activation in settings["activations"]:
        cells = []
        for estimator in NAMES:
            for lam in settings["lams"]:
                found = _curves(rows, activation, estimator, lam)
                cells.append([f"{estimator} lam={lam:g}", *(_cell([curve[k - 1] for curve in found]) for k in ks)])
        tables += [f"### {activation}", markdown.table(["", *(f"k={k}" for k in ks)], cells, "l" + "r" * len(ks))]
    checks = record["checks"]
    steps = [check["steps"] for check in checks]
    about = (
        f"One layer act(W z + U x + b), the spectral norm of W {settings['spectral_norm']:g}, random static weights, "
        f"{settings['dim']} units, a batch of {settings['batch']}. Cosine of the gradient to W, U and b between a "
        "phantom gradient and backpropagation through the iterations. The plain iteration took "
        f"{min(steps)} to {max(steps)} steps. The curves are in `curves.json`, drawn in `curves.png`."
    )
    heading = f"## Cosine to the exact gradient, mean ± std over {len(settings['seeds'])} seeds"
    return claims.page(record, "Figure 1: phantom and exact gradients on random contractions", about, heading, *tables)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the figure: NPG and UPG beside each other, a row per activation, a line per lam."""
    settings, rows = record["settings"], record["rows"]
    lams, activations = settings["lams"], settings["activations"]
    figure, axes = plots.canvas(len(activations), len(NAMES), sharex=True, sharey="row")
    for line, activation in zip(axes, activations, strict=True):
        for axis, (estimator, name) in zip(line, NAMES.items(), strict=True):
            for lam, color in zip(lams, plots.shades(len(lams)), strict=True):
                found = _curves(rows, activation, estimator, lam)
                plots.band(axis, range(1, len(found[0]) + 1), found, color, label=f"lam = {lam:g}")
            axis.set_title(f"{name} ({activation})", fontsize=10)
            axis.set_ylim(top=1.005)
        line[0].set_ylabel("cosine to the exact gradient")
    for axis in axes[-1]:
        axis.set_xlabel("k")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][-1].legend(fontsize=8, loc="lower right")
    plots.save(figure, path)


def _curves(rows: list[dict[str, Any]], activation: str, estimator: str, lam: float) -> list[list[float]]:
    place = (activation, estimator, lam)
    return [row["cosine"] for row in rows if (row["activation"], row["estimator"], row["lam"]) == place]


def _cell(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
