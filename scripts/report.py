"""Render the pages of studies from their records, and from nothing else.

    python scripts/report.py                  # every page of results/, and its index results/README.md
    python scripts/report.py table1 chains    # these studies, and print their pages

A study is a folder of results/ with a study.yaml; see scripts/studies.py. A cell of a table is mean ± std (n), a
smaller budget is labelled, and a row without a record prints --. A figure is drawn once it has a curve. This needs no
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    from scripts import arguments, studies
    from scripts.reporting import pages
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")


def main(names: Sequence[str]) -> None:
    """Render the named studies, or all."""
    known = studies.names()
    arguments.split([name for name in names if name.startswith("-") or "=" in name], doc=__doc__)
    unknown = [name for name in names if name not in known]
    if unknown:
        arguments.fail(f"no study {', '.join(unknown)}; choose from {', '.join(known)}")
    for study in map(studies.load, names or known):
        for path, text in pages.write(study).items():
            print(text if names else path.relative_to(studies.ROOT))
        if "figure" in study and not (study["folder"] / "curves.json").exists():
            print(f"{study['name']} has no curve to draw yet: python scripts/reproduce.py {study['name']}")
    pages.write_index()


if __name__ == "__main__":
    main(sys.argv[1:])
