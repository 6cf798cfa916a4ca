"""Figure 3: accuracy against k by lam, NPG against UPG, and the spectral radius of the damped map along a training."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from scripts import studies
from scripts.reporting import markdown, plots, tables
from scripts.reporting.grids.runs import Runs, source


def page(grid: dict[str, Any], runs: Runs) -> markdown.Page:
    """Return the page: best and last accuracy, and the radius; a row per estimator and lam, a column per k."""
    axes = studies.axes(grid, runs.scale)
    heads = ["estimator", "lam", *(f"k = {k}" for k in axes["k"])]
    metric, split = grid["metric"], grid["split"]

    def table(show: Any) -> markdown.Table:
        rows = [
            [name, str(lam), *(show(runs.found.get((name, _setting(k, lam)), [])) for k in axes["k"])]
            for name in grid["experiments"]
            for lam in axes["lam"]
        ]
        return markdown.table(heads, rows, "lr" + "r" * len(axes["k"]))

    return markdown.page(
        f"# {grid['title']}{runs.label}",
        f"The best evaluation of a run on `{split}`, as the paper reports: mean ± sample std (n); -- means not run.",
        table(lambda records: tables.cell([record["best"][split][metric] for record in records], "sample")),
        "The last evaluation:",
        table(lambda records: tables.cell([record["final"][split][metric] for record in records], "sample")),
        "Spectral radius of lam J + (1 - lam) I at the equilibria of a training batch. A number is the mean over the "
        f"images of the batch, and over the last tenth of a run's measurements, at least one{_counts(runs.records)}. "
        "The Neumann series behind NPG converges for an image whose own radius is below 1; a mean below 1 does not say "
        "so of every image:",
        table(_radius),
        source(runs),
    )


def draw(grid: dict[str, Any], runs: Runs, path: Path) -> None:
    """Draw (a) the accuracy of UPG by k and lam, (b) that of NPG beside it, and the radius along both trainings."""
    axes = studies.axes(grid, runs.scale)
    lams = axes["lam"]
    colors = dict(zip(lams, plots.shades(len(lams)), strict=True))
    canvas, panels = plots.canvas(2, 2)
    accuracy, beside, *radii = panels.flat
    for lam in lams:
        for name, panel, style in (
            ("UPG", accuracy, {"marker": "o"}),
            ("UPG", beside, {"marker": "o", "linestyle": "--", "alpha": 0.6}),
            ("NPG", beside, {"marker": "s"}),
        ):
            points = [(k, runs.found.get((name, _setting(k, lam)), [])) for k in axes["k"]]
            bests = {k: [record["best"][grid["split"]][grid["metric"]] for record in records] for k, records in points}
            # None is a number that was not finite
            means = {k: fmean(values) for k, values in bests.items() if values and None not in values}
            if means:
                label = f"lam = {lam}" if panel is accuracy else f"{name}, lam = {lam}"
                panel.plot([*means], [*means.values()], color=colors[lam], label=label, **style)
        for name, panel in zip(("UPG", "NPG"), radii, strict=True):
            for i, k in enumerate(axes["k"]):
                records = runs.found.get((name, _setting(k, lam)), [])
                curve = _mean_radius(records)
                if curve:  # the line of a larger k is thicker
                    panel.plot([*curve], [*curve.values()], color=colors[lam], linewidth=0.6 + 0.35 * i)
    for panel, title in ((accuracy, "(a) UPG"), (beside, "(b) NPG, and UPG dashed")):
        panel.set(xlabel="k", ylabel=f"{grid['split']} {grid['metric']}", title=title, xticks=axes["k"])
        panel.legend(frameon=False, fontsize=7)
    for panel, name in zip(radii, ("UPG", "NPG"), strict=True):
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(
            xlabel="step of training", ylabel="radius of lam J + (1 - lam) I", title=f"{name}: thicker for larger k"
        )
    canvas.suptitle(f"MDEQ-Tiny by k and lam{runs.label}", fontsize=10)
    plots.save(canvas, path)


def _setting(k: int, lam: float) -> tuple[str, ...]:
    return (f"k={k}", f"lam={lam}")


def _mean_radius(records: list[dict[str, Any]]) -> dict[int, float]:
    """Return the mean radius over some runs by step, at the steps where all of them have a finite one."""
    traces = [{row["step"]: row["damped_spectral_radius"] for row in record["monitor"]} for record in records]
    steps = [step for step in (traces[0] if traces else ()) if all(one.get(step) is not None for one in traces)]
    return {step: fmean(one[step] for one in traces) for step in steps}


def _damped(record: dict[str, Any]) -> list[float]:
    return [row["damped_spectral_radius"] for row in record["monitor"] if row["damped_spectral_radius"] is not None]


def _last(values: list[float]) -> list[float]:
    """Return the last tenth of some measurements, and at least one."""
    return values[-max(1, len(values) // 10) :]


def _counts(records: list[dict[str, Any]]) -> str:
    """Return how many of a run's measurements are its last ones: ` (1 of 12)`."""
    found = sorted({(len(_last(values)), len(values)) for record in records if (values := _damped(record))})
    return f" ({', '.join(f'{last} of {total}' for last, total in found)})" if found else ""


def _radius(records: list[dict[str, Any]]) -> str:
    ends = [_last(values) for record in records if (values := _damped(record))]
    return f"{fmean(map(fmean, ends)):.3f}" if ends else "--"
