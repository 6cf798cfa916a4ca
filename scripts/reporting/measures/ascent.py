"""Theorem 1 of the paper: the page and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.reporting import claims, markdown, plots

FAMILIES = {
    "matrix": "Neumann series of random matrices",
    "NPG": "NPG on a layer, from a coarse start",
    "UPG": "UPG on a layer, from a coarse start",
}
LOW, HIGH = 1e-4, 1e2  # what lies outside is drawn on the edge


def page(record: dict[str, Any]) -> markdown.Page:
    """Return the page."""
    counts = record["counts"]
    ks = sorted({row["k"] for row in record["rows"]})
    rows = []
    for family, name in FAMILIES.items():
        for lam in record["settings"]["lams"]:
            found = {row["k"]: row["ratio"] for row in record["rows"] if (row["family"], row["lam"]) == (family, lam)}
            cells = [f"{sum(r < 1 for r in found[k]) / len(found[k]):.0%}" if k in found else "" for k in ks]
            rows.append([f"{name}, lam={lam:g}", *cells])
    about = (
        "Where |A (I - dF/dh) - dF/dtheta| < sigma_min^2 / sigma_max (6), the phantom gradient ascends, whatever the "
        f"loss. Dense Jacobians of {record['settings']['dim']} unknowns; the smallest <phantom, exact> / |exact|^2 "
        "over all losses is an eigenvalue. Every case is a point of `theorem1.png`."
    )
    kinds = "; ".join(f"{name}: {count}" for name, count in counts.items())
    remark = f"The condition is sufficient, and far from necessary. {kinds}."
    return claims.page(
        record,
        "Theorem 1: when a phantom gradient ascends",
        about,
        "## Share of cases where the condition (6) holds",
        markdown.table(["", *(f"k={k}" for k in ks)], rows, "l" + "r" * len(ks)),
        remark,
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw every case: the two sides of the condition against the least inner product."""
    figure, axes = plots.canvas(1, 1, width=6, height=4)
    axis = axes[0][0]
    for i, (family, name) in enumerate(FAMILIES.items()):
        rows = [row for row in record["rows"] if row["family"] == family]
        x = [min(max(ratio, LOW), HIGH) for row in rows for ratio in row["ratio"]]
        y = [least for row in rows for least in row["least"]]
        axis.scatter(x, y, s=14, alpha=0.6, color=f"C{i}", marker="o+x"[i], linewidths=0.8, label=name)
    axis.axvline(1, color="black", linewidth=1)
    axis.axhline(0, color="black", linewidth=1)
    axis.axvspan(LOW, 1, color="black", alpha=0.06)
    axis.set(xscale="log", xlim=(LOW, HIGH))
    axis.set_xlabel("left side of (6) over its right side; the theorem speaks of the shaded half")
    axis.set_ylabel("least <phantom, exact> / |exact|$^2$")
    axis.legend(fontsize=8, loc="lower left")
    plots.save(figure, path)
