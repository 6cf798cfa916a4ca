"""What a card can do at most, and how near a step comes: a roofline of FLOPs and bytes.

A step that computes n FLOPs and moves m bytes takes at least max(n / peak FLOP/s, m / bandwidth) seconds (Williams,
Waterman, Patterson 2009), with n and m as scripts/bench/traffic.py counts them in the eager step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from scripts.reporting import markdown


class Card(NamedTuple):
    """Peaks of a card by its maker's data sheet, dense, per second.

    Args:
        bandwidth: bytes of its memory.
        flops: of matrix products, by number format.
    """

    bandwidth: float
    flops: dict[str, float]


# NVIDIA's data sheets of the A100 (2021), H100 (2023) and H200 (2024); those of the latter two give matrix units with
# sparsity, which is twice what dense products have
AMPERE = {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}
HOPPER = {"fp32": 67e12, "tf32": 989e12 / 2, "bf16": 1979e12 / 2}
CARDS = {
    "NVIDIA A100-SXM4-40GB": Card(1.555e12, AMPERE),
    "NVIDIA A100-SXM4-80GB": Card(2.039e12, AMPERE),
    "NVIDIA H100 80GB HBM3": Card(3.35e12, HOPPER),  # the SXM card
    "NVIDIA H200": Card(4.8e12, HOPPER),
}
HEADS = ("variant", "GFLOP", "GB moved", "limit by FLOPs, ms", "limit by bytes, ms", "step, ms", "limit / step, %")

ABOUT = (
    "FLOPs of convolutions, matrix products and attention, and bytes that the operators of the eager step read and "
    "write, each tensor once per operator. A compiled step computes as much and moves less: it may be faster than this "
    "limit by bytes."
)


def blocks(result: dict[str, Any]) -> list[str]:
    """Return the part of a benchmark's page about limits; nothing where the work of no step was counted."""
    if not cells(result):
        return []
    name = result["about"]["machine"]
    card = CARDS.get(name)
    if card is None:
        peaks = f"No limit is shown: {name} is none of {', '.join(CARDS)}, whose peaks are known."
    else:
        flops = ", ".join(f"{kind} {peak / 1e12:g} TFLOP/s" for kind, peak in card.flops.items())
        peaks = f"Peaks by the maker's data sheet: {card.bandwidth / 1e12:g} TB/s, {flops}."
    return ["## Limits of the card", f"{ABOUT} {peaks}", markdown.table(HEADS, cells(result), "lrrrrrr")]


def of_a_suite(results: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return the part of a suite's page about limits, from (title, result) of the benchmarks on known cards."""
    known = [(title, result) for title, result in results if result["about"]["machine"] in CARDS]
    rows = [[title, *line] for title, result in known for line in cells(result)]
    return ["## Limits of the card", ABOUT, markdown.table(("model", *HEADS), rows, "llrrrrrr")] if rows else []


def cells(result: dict[str, Any]) -> list[list[str]]:
    """Return a line of the table for every step whose work was counted."""
    card = CARDS.get(result["about"]["machine"])
    return [_cells(row, card) for row in result["rows"] if "flops" in row]


def limits(row: dict[str, Any], card: Card) -> tuple[float, float] | None:
    """Return the seconds that FLOPs and bytes of a step take at least; None for a number format without a peak."""
    kinds = {"float32": "fp32" if row["precision"] == "fp32" else "tf32", "bfloat16": "bf16"}
    if not row["flops"].keys() <= kinds.keys():
        return None
    compute = sum(count / card.flops[kinds[number]] for number, count in row["flops"].items())
    return compute, row["moved_bytes"] / card.bandwidth


def _cells(row: dict[str, Any], card: Card | None) -> list[str]:
    seconds = row["seconds"]["total"]["median"]
    found = limits(row, card) if card else None
    shown = ["--", "--"] if found is None else [f"{1e3 * limit:.3g}" for limit in found]
    share = "--" if found is None else f"{100 * max(found) / seconds:.1f}"
    work = [f"{sum(row['flops'].values()) / 1e9:.4g}", f"{row['moved_bytes'] / 1e9:.3g}"]
    return [row["label"], *work, *shown, f"{1e3 * seconds:.3g}", share]
