"""The page of an exploration: gradient estimators and solvers on a model, and which of them are worth their cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.reporting import markdown, plots, provenance

CONVERGED = 1e-2  # of the reference's backward solve; above it, its cosines mean little
SOLVED = 0.1  # of the forward solve; a rollout that stays above it ends at no equilibrium


def render(result: dict[str, Any]) -> markdown.Page:
    """Return the page of the comparison, the cheapest gradient first."""
    heads = ["estimator", "f with a graph", "vjps", "ms", "cosine", "norm ratio", "backward residual", "MB", "front"]
    ahead = [row["estimator"] for row in front(result["rows"])]
    rows = [
        [*_row(row), "yes" if row["estimator"] in ahead else ""]
        for row in sorted(result["rows"], key=lambda row: row["seconds"])
    ]
    evaluations = list(result["solvers"][0]["residual"])
    solvers = [[row["solver"], *(_number(row["residual"][n], ".1e") for n in evaluations)] for row in result["solvers"]]
    return markdown.page(
        f"# {result['title']}",
        f"`{result['command']}`",
        _about(result),
        *([result["note"]] if "note" in result else []),
        *([_answer(result)] if "wanted" in result else []),
        markdown.table(heads, rows, "lrrrrrrrl"),
        "Median relative residual of the best iterate after the evaluations of f in the first column:",
        markdown.table(["solver", *evaluations], solvers, "l" + "r" * len(evaluations)),
    )


def is_labelled(record: dict[str, Any]) -> bool:
    """Return whether estimators are named by the items that choose them, as all but the first records do."""
    return all(row["estimator"].startswith("grad=") for row in record["rows"])


def summary(title: str, records: Mapping[str, dict[str, Any]]) -> markdown.Page:
    """Return the page that sets explorations beside each other: the cosines of the estimators that all of them have."""
    cosines = {name: {row["estimator"]: row["cosine"] for row in record["rows"]} for name, record in records.items()}
    first = next(iter(cosines.values()))
    shared = [label for label in first if all(label in found for found in cosines.values())]
    about = [
        [
            *(f"[{name}]({name}.md)", record["title"], f"{_number(record['radius']['1'], '.2f')}"),
            *(_number(record["residual"], ".1e"), _number(record["reference"]["adjoint_residual"], ".1e")),
        ]
        for name, record in records.items()
    ]
    heads = [
        "weights",
        "what they are",
        "spectral radius of J",
        "forward residual",
        "backward residual of the reference",
    ]
    rows = [[label, *(_number(found[label], ".3f") for found in cosines.values())] for label in shared]
    return markdown.page(
        f"# {title}",
        "Cosine of the gradient of all parameters before the equilibrium to exact implicit differentiation, at the "
        f"equilibrium that the run's own solver finds. {provenance.commit_line(records.values())}",
        markdown.table(heads, about, "llrrr"),
        markdown.table(["estimator", *records], rows, "l" + "r" * len(records)),
    )


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the estimators that no other one beats in both time and cosine, the cheapest first."""
    found: list[dict[str, Any]] = []
    for row in sorted(_measured(rows), key=lambda row: (row["seconds"], -row["cosine"])):
        if not found or row["cosine"] > found[-1]["cosine"]:
            found.append(row)
    return found


def cheapest(rows: list[dict[str, Any]], wanted: float) -> dict[str, Any] | None:
    """Return the estimator that reaches the cosine `wanted` in the least time; None where none does."""
    enough = [row for row in _measured(rows) if row["cosine"] >= wanted]
    return min(enough, key=lambda row: row["seconds"], default=None)


def family(label: str) -> str:
    """Return the estimator of a row, `upg` of `grad=upg k=5 lam=0.5`: rows of one have one colour."""
    return label.removeprefix("grad=").split(" ")[0].rstrip(",")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw cosine against milliseconds, a colour per estimator, with the front as a line.

    Without a finite cosine there is nothing to draw, and no file.
    """
    measured = _measured(result["rows"])
    if not measured:
        return
    figure, axes = plots.canvas(1, 1, width=6.4, height=4.4)
    axis, families = axes[0][0], {}
    for row in measured:
        families.setdefault(family(row["estimator"]), []).append(row)
    for name, rows in families.items():
        axis.scatter([1e3 * row["seconds"] for row in rows], [row["cosine"] for row in rows], label=name, zorder=3)
    ahead = front(result["rows"])
    best = [row["cosine"] for row in ahead]
    axis.step([1e3 * row["seconds"] for row in ahead], best, where="post", color="0.4", label="front", zorder=2)
    if "wanted" in result:
        axis.axhline(result["wanted"], color="0.4", linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="attach and backward, ms", ylabel="cosine to the exact gradient")
    axis.legend(frameon=False, fontsize="small")
    plots.save(figure, path)


def _about(result: dict[str, Any]) -> str:
    reference = result["reference"]
    radii = ", ".join(f"{_number(value, '.2f')} at lam={name}" for name, value in result["radius"].items())
    # records of before have `images` of one batch
    examples = result["examples"] if "examples" in result else f"{result['images']} training images"
    weights = f"of `{result['init']}`" if "init" in result else f"of step {result['step']}"
    residual = reference["adjoint_residual"]
    unsolved = reference.get("unsolved")  # of which records of before know nothing; those problems may count most
    solved = residual is not None and residual < CONVERGED and not unsolved
    doubt = "" if solved else " **It has not converged: doubt the cosines.**"
    elsewhere = (
        " **This is no equilibrium: the exact gradient of its loss is another one than the reference.**"
        if result["residual"] is None or result["residual"] >= SOLVED
        else ""
    )
    above = "" if unsolved is None else f", {100 * unsolved:.1f} % of the problems above {CONVERGED:g}"
    return (
        f"{examples}, weights {weights}, median forward residual {_number(result['residual'], '.1e')}.{elsewhere} "
        f"Spectral radius of lam J + (1 - lam) I: {radii}. Reference: {reference['vjps']} vjps, median backward "
        f"residual {_number(residual, '.1e')}{above}.{doubt} Milliseconds are those of attach and backward, the head "
        f"included ({result['device']}). MB: the most that the step's tensors take from the end of the solve on. The "
        f"front is what no other estimator beats in both milliseconds and cosine. {provenance.commit_line([result])}"
    )


def _answer(result: dict[str, Any]) -> str:
    found = cheapest(result["rows"], result["wanted"])
    if found is not None:
        milliseconds = f"{1e3 * found['seconds']:.1f} ms"
        return f"The cheapest with a cosine of {result['wanted']:g}: `{found['estimator']}`, {milliseconds}."
    best = max(_measured(result["rows"]), key=lambda row: row["cosine"], default=None)
    nearest = "" if best is None else f"; the nearest is `{best['estimator']}` with {best['cosine']:.3f}"
    return f"None has a cosine of {result['wanted']:g}{nearest}."


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["cosine"] is not None]  # null: not finite


def _row(row: dict[str, Any]) -> list[str]:
    return [
        *(row["estimator"], str(row["graph_evals"]), str(row["vjps"]), f"{1e3 * row['seconds']:.{_digits(row)}f}"),
        *(_number(row["cosine"], ".3f"), _number(row["norm_ratio"], ".2f")),
        "" if row["adjoint_residual"] is None else f"{row['adjoint_residual']:.1e}",
        f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "",
    ]


def _digits(row: dict[str, Any]) -> int:
    return 0 if row["seconds"] >= 0.1 else 1


def _number(value: float | None, form: str) -> str:
    return "--" if value is None else format(value, form)
