"""Say where two runs part: the first step, and the number that is not the same.

    python scripts/compare.py main .                                    # the code of a commit and the code as it stands
    python scripts/compare.py HEAD~3 HEAD model=ignn data=chains steps=20
    python scripts/compare.py "grad=upg k=5" "grad=npg k=5" data=digits  # two configs
    python scripts/compare.py runs/a/default/seed0 runs/b/default/seed0  # two runs that are there

    rtol=<number>   relative difference that counts as none (default: 0, bit for bit)

Each of the two sides is a commit, `.`, a config in quotes, or a run folder. What follows goes to train.py, for both: a
run of eight steps that logs each, on one thread of the CPU, unless it says otherwise. Times and memory are not
compared. The exit status is 0 where the runs agree, and 1 where they part.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

try:
    from scripts import arguments
    from scripts.running import parting
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")


def main(items: Sequence[str]) -> bool:
    """Compare the first two items, print where they part, and return whether they agree."""
    sides = list(items[:2])
    asks = [item for item in items if item.startswith("-")]
    own, _, overrides = arguments.split(asks or items[2:], doc=__doc__, own=("rtol",))
    if len(sides) < 2:
        arguments.fail("name two sides: commits, `.`, configs in quotes, or run folders; see --help")
    try:
        rtol = float(own.get("rtol", 0))
    except ValueError:
        arguments.fail(f"rtol={own['rtol']} must be a number, such as 1e-6")
    if overrides and all(map(parting.is_run, sides)):
        arguments.fail(f"both sides are runs that are there: {overrides[0]} has nothing to change, leave it out")
    runs = []
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            try:
                runs.append(parting.read(side, overrides, Path(folder)))
            except RuntimeError as error:
                arguments.fail(str(error))
    found = parting.part(*runs, rtol=rtol)
    if found is None:
        print(f"they agree in all {parting.counted(runs[0])} numbers of {len(runs[0])} rows")
    else:
        print(f"they part at {found}")
    return found is None


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
