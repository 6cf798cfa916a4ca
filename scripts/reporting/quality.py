"""The page of a comparison of gradient estimators and solvers on a trained model."""

from __future__ import annotations

from typing import Any

from scripts.reporting import markdown


def render(result: dict[str, Any]) -> str:
    """Return the page of the comparison, the cheapest gradient first."""
    reference = result["reference"]
    radii = ", ".join(f"{value:.2f} at lam={name}" for name, value in result["radius"].items())
    about = (
        f"{result['images']} training images, weights of step {result['step']}, median forward residual "
        f"{result['residual']:.1e}. Spectral radius of lam J + (1 - lam) I: {radii}. Reference: {reference['vjps']} "
        f"vjps, median backward residual {reference['adjoint_residual']:.1e}. Milliseconds are those of attach and "
        f"backward, the head included ({result['device']})."
    )
    heads = ["estimator", "f with a graph", "vjps", "ms", "cosine", "norm ratio", "backward residual"]
    rows = [_row(row) for row in sorted(result["rows"], key=lambda row: row["seconds"])]
    evaluations = list(result["solvers"][0]["residual"])
    solvers = [[row["solver"], *(f"{row['residual'][n]:.1e}" for n in evaluations)] for row in result["solvers"]]
    return markdown.page(
        f"# {result['title']}",
        f"`{result['command']}`",
        about,
        markdown.table(heads, rows, "lrrrrrr"),
        "Median relative residual of the best iterate after the evaluations of f in the first column:",
        markdown.table(["solver", *evaluations], solvers, "l" + "r" * len(evaluations)),
    )


def _row(row: dict[str, Any]) -> list[str]:
    return [
        *(row["estimator"], str(row["graph_evals"]), str(row["vjps"]), f"{1e3 * row['seconds']:.0f}"),
        *(f"{row['cosine']:.3f}", f"{row['norm_ratio']:.2f}"),
        "" if row["adjoint_residual"] is None else f"{row['adjoint_residual']:.1e}",
    ]
