"""The runs of a grid: records at the largest scale that has any, and what becomes of them in every figure."""

from __future__ import annotations

from typing import Any, NamedTuple

from scripts import studies
from scripts.reporting import provenance
from scripts.reporting.tables import SCALES, label_of, other_precisions, read


class Runs(NamedTuple):
    """The records of a grid.

    Args:
        scale: the largest one with a record; the paper's where there is none.
        found: records by (name of the experiment, settings of the point), seeds in one list; no point without one.
    """

    scale: str
    found: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records."""
        return [record for records in self.found.values() for record in records]

    @property
    def label(self) -> str:
        """The label of a smaller budget, for titles and captions."""
        return label_of(self.scale, self.records)


def runs_of(grid: dict[str, Any]) -> Runs:
    """Return the runs of a grid; those of two scales are never in one figure."""
    for scale in SCALES:
        found = {
            (point.name, point.overrides): read(studies.record_folder(point.experiment, scale, point.overrides))
            for point in studies.points(grid, scale)
        }
        found = {point: records for point, records in found.items() if records}
        if found:
            return Runs(scale, found)
    return Runs("paper", {})


def source(runs: Runs) -> str:
    """Return the line that says where the numbers come from."""
    records = runs.records
    if not records:
        return "Nothing has been run yet."
    devices, steps = sorted({record["device"] for record in records}), sorted({record["steps"] for record in records})
    budget = "the paper" if runs.scale == "paper" else f"scale={runs.scale}"
    ran_on = ", ".join([*devices, *other_precisions(records)])
    return (
        f"Budget of {budget}{runs.label}: {' or '.join(map(str, steps))} steps, {len(records)} runs on "
        f"{ran_on}. {provenance.commit_line(records)}"
    )
