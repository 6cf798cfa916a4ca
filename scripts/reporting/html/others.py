"""What the command of a run says besides what its record is filtered by: runs that differ in it are not one point."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from scripts.reporting.html.chosen import KEYS

SHOWN = (*KEYS, "grad.k", "grad.lam", "scale", "experiment")
# experiments that differ in k and lam alone have them in their names, as table4/cox2_upg_k5_lam0.8
POINT = re.compile(r"_k\d+|_lam\d+(\.\d+)?")


def others(record: Mapping[str, Any]) -> list[str]:
    """Return the experiment, without its k and lam, and the items of the command that say something else."""
    pairs = [(item, item.lstrip("+").partition("=")) for item in record.get("overrides", ())]
    typed = next((value for _, (key, _, value) in pairs if key == "experiment"), None)
    experiment = typed or record.get("experiment")
    named = [f"experiment={POINT.sub('', experiment)}"] if experiment else []
    return [*named, *(item for item, (key, _, _) in pairs if key not in SHOWN)]
