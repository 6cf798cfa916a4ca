"""Run what a study lacks, and keep the records.

    python scripts/reproduce.py table1                            # every seed of every row, at the paper's budget
    python scripts/reproduce.py table1 rows=upg_k5_lam0.5,implicit scale=smoke data.root=/data/cifar10
    python scripts/reproduce.py table1 list                       # the commands, one a line, and nothing run
    python scripts/reproduce.py table4 rows=cox2_implicit         # ten folds, as many at a time as cores
    python scripts/reproduce.py table4 rows=cox2_implicit data.folds=stratified data.eval_adjacency=same \\
        data.validation=0.1 eval_splits=[valid,test]              # an honest protocol
    python scripts/reproduce.py chains panels="length 10"         # the lines of one panel of a figure
    python scripts/reproduce.py fig1                              # measured, nothing is trained; also theorems, table2
    python scripts/reproduce.py theorems rows=theorem1 dim=10     # one of its measures, with a setting changed

    rows=<name,...>    these rows, lines or measures alone
    panels=<name,...>  these panels of a figure alone
    folds=<n,...>      these folds alone; their record is written only once all ten are run together
    jobs=<n>           runs at a time; several have one thread each
    again              run what has a record, too
    list               print the commands and run nothing

Everything else goes to train.py, or is a setting of a measure (those are in study.yaml). What has a record in results/
is not run; finished runs of runs/ are not trained again, interrupted ones resume. A run that was typed as model=, data=
and grad= counts as the row whose resolved config it has. Overrides that make it another experiment are in the name of
the record, which no page shows. `python scripts/report.py` renders the pages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    from phantom.engine.errors import UserError
    from scripts import arguments, studies
    from scripts.running import process
    from scripts.running import study as running
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")


def main(items: Sequence[str]) -> None:
    """Run a study: its name first, then the items of this command, and overrides of train.py."""
    known = [name for name in studies.names() if running.rows_of(studies.load(name))]
    name = items[0] if items else ""
    own, words, overrides = arguments.split(
        items[1:] if name in known else [item for item in items if item.startswith("-")],
        doc=__doc__,
        own=("rows", "panels", "folds", "jobs"),
        words=("list", "again"),
    )
    if name not in known:
        other = f"{name} is no study of training runs, results/README.md has its command; " * (name in studies.names())
        arguments.fail(f"{other}name a study first, one of {', '.join(known)}")
    study, jobs = studies.load(name), arguments.count(own, "jobs", None)
    try:
        works = running.works(study, own, overrides, again="again" in words)
    except UserError as error:
        arguments.fail(str(error))
    if not works:
        print(f"nothing is missing in {study['name']}; `again` runs it once more", file=sys.stderr)
    for work in works:
        if "list" in words:
            print(*(run.line() for run in work.runs), sep="\n")
            continue
        print(f"to run: {len(work.runs)}. {work.cost or 'No record says what they cost'}.", file=sys.stderr)
        try:
            process.execute(work, jobs)
        except RuntimeError as error:
            arguments.fail(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
