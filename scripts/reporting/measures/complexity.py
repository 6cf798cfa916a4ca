"""Table 2 of the paper: the page and the figure of measured time and memory."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from scripts.reporting import claims, markdown, plots

# (time, memory, peak of the whole protocol) of the paper; it has no row for backpropagation through time
PAPER = {
    "Implicit, Broyden": ("O(K)", "O(1)", "O(k)"),
    "Implicit, plain iteration": ("O(K)", "O(1)", "O(k)"),
    "BPTT": ("", "", ""),
    "UPG": ("O(k)", "O(k)", "O(k)"),
    "NPG": ("O(k)", "O(1)", "O(1)"),
}
PEAKS = {"Implicit, Broyden": "implicit_protocol", "UPG": "upg", "NPG": "npg"}


def page(record: dict[str, Any]) -> markdown.Page:
    """Return the page."""
    settings, fits, peaks = record["settings"], record["fits"], record["protocols"]
    k = settings["protocol_k"]
    rows = []
    for method, paper in PAPER.items():
        fit = fits[method]
        peak = f"{_mb(peaks[PEAKS[method]])} MB" if method in PEAKS else ""
        time = f"{fit['ms']:.0f} + {fit['ms_per_step']:.1f} n ms"
        memory = f"{_mb(fit['bytes'])} + {fit['bytes_per_step'] / 1e6:.2f} n MB"
        rows.append([method, paper[0], time, paper[1], memory, paper[2], peak])
    heads = ["method", "time, paper", "time", "memory, paper", "memory", "whole protocol, paper", "its peak"]
    about = (
        f"The trainer's steps with `{' '.join(settings['model'])}`. Time is that of attach and backward, in CPU time "
        "of the process on one thread, as the machine is shared: waiting is not counted, a slower memory is. Memory is "
        "the peak of the live tensors that a step makes, without parameters, counted operator by operator. n is the "
        "number of solver steps K, of unrolled steps, or of phantom steps k; straight lines by least squares through "
        f"medians of {settings['repeats']} interleaved rounds, drawn in `table.png`."
    )
    points = [
        [
            row["method"],
            str(row["steps"]),
            f"{median(row['ms']):.0f}",
            _mb(row["bytes"]),
            str(row["evals"]),
            str(row["vjps"]),
        ]
        for row in record["rows"]
    ]
    return claims.page(
        record,
        "Table 2: time and memory, measured",
        about,
        "## Beside the paper",
        markdown.table(heads, rows, "lrrrrrr"),
        f"Whole protocols have {settings['solver_steps']} forward Broyden steps. Implicit: the larger of its unrolled "
        f"pretraining of {settings['pretraining_steps']} steps ({_mb(peaks['pretraining'])} MB) and a step with "
        f"{settings['adjoint_steps']} backward Broyden steps ({_mb(peaks['implicit'])} MB). UPG and NPG: k={k}.",
        "## All points",
        markdown.table(["method", "n", "ms", "MB", "f with a graph", "vjps"], points, "lrrrrr"),
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw time and memory against steps, with the fitted lines."""
    figure, axes = plots.canvas(1, 2, height=3.8)
    for i, method in enumerate(PAPER):
        rows, fit = [row for row in record["rows"] if row["method"] == method], record["fits"][method]
        x = [row["steps"] for row in rows]
        time, memory = [median(row["ms"]) for row in rows], [row["bytes"] / 1e6 for row in rows]
        lines = ("ms", 1), ("bytes", 1e-6)
        for axis, values, (name, unit) in zip(axes[0], (time, memory), lines, strict=True):
            axis.scatter(x, values, color=f"C{i}", s=18, marker="os^vD"[i], label=method)
            fitted = [unit * (fit[name] + fit[f"{name}_per_step"] * n) for n in x]
            axis.plot(x, fitted, color=f"C{i}", linewidth=1)
    axes[0][0].set(xlabel="steps: K, or k of UPG and NPG", ylabel="ms of attach and backward", ylim=(0, None))
    axes[0][1].set(xlabel="steps: K, or k of UPG and NPG", ylabel="peak of live tensors, MB", ylim=(0, None))
    axes[0][0].legend(fontsize=8)
    plots.save(figure, path)


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f}"
