"""A statement of the paper beside the number that was measured for it."""

from __future__ import annotations

import operator
from typing import Any, SupportsFloat

RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def claim(text: str, measured: SupportsFloat, relation: str, bound: float) -> dict[str, Any]:
    """Return a claim: `claim`, `measured`, `needed`, and whether it `holds`; a measured NaN never does.

    Args:
        relation: `<`, `<=`, `>` or `>=`.
    """
    return {
        "claim": text,
        "measured": significant(measured),
        "needed": f"{relation} {bound:g}",
        "holds": RELATIONS[relation](float(measured), bound),
    }


def significant(value: SupportsFloat, digits: int = 6) -> float:
    """Round the value to significant digits, because people read records, too."""
    return float(f"{float(value):.{digits}g}")
