"""Break runs from outside, and see whether they end as promised: real processes, real files, real signals.

    python scripts/drill.py                       # every round, some minutes; needs Linux
    python scripts/drill.py sigterm last-cut      # these
    python scripts/drill.py list                  # name them, with their promises

Prints a table, and ends with 1 where a promise was broken. Each round has a folder of its own, which is removed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

try:
    from scripts import arguments
    from scripts.drilling import commands, files, identity, origins, signals, trees, writers  # noqa: F401 - of rounds
    from scripts.drilling.room import BrokenPromiseError, Room, forget
    from scripts.drilling.rounds import ROUNDS
    from scripts.reporting import markdown
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")


def main(items: Sequence[str]) -> int:
    """Play the rounds that are named, or all; return the exit status."""
    chosen = arguments.split(items, doc=__doc__, words=("list", *ROUNDS))
    if chosen.overrides:
        arguments.fail(f"{chosen.overrides[0]} is not known: name rounds, or nothing for all of them")
    if "list" in chosen.words:
        print(*(f"{each.name:<22} {each.promise}" for each in ROUNDS.values()), sep="\n")
        return 0
    names = chosen.words or list(ROUNDS)
    rows, broken = [], []
    try:
        for name in names:
            begin = time.monotonic()
            with Room() as room:
                try:
                    ROUNDS[name].play(room)
                except BrokenPromiseError as error:
                    broken.append(name)
                    print(f"\n{name}: {error}\n", file=sys.stderr)
            rows.append([name, ROUNDS[name].promise, "**no**" if name in broken else "yes"])
            print(f"{name}: {rows[-1][-1]}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    finally:
        forget()
        print(markdown.table(["round", "promise", "holds"], rows))
        print(f"\n{len(rows) - len(broken)} of {len(names)} rounds hold", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
