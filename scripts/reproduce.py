"""Run what a study lacks, and keep the records.

    python scripts/reproduce.py all scale=smoke                   # every row of every study, rehearsed end to end
    python scripts/reproduce.py table1                            # every seed of every row, at the paper's budget
    python scripts/reproduce.py table1 rows=upg_k5_lam0.5,implicit scale=smoke data.root=/data/cifar10
    python scripts/reproduce.py table1 scale=cpu data.root=/data/cifar10 deadline=28000  # a night of the CPU cores
    python scripts/reproduce.py table3 gpus=8                     # each run under torchrun, a process a GPU
    python scripts/reproduce.py table1 list                       # the commands, one a line, and nothing run
    python scripts/reproduce.py table4 rows=cox2_implicit         # ten folds, as many at a time as cores
    python scripts/reproduce.py table4 rows=cox2_implicit data.folds=stratified data.eval_adjacency=same \\
        data.validation=0.1 eval_splits=[valid,test]              # an honest protocol
    python scripts/reproduce.py chains panels="length 10"         # the lines of one panel of a figure
    python scripts/reproduce.py fig1 theorems table2              # several; these are measured, and nothing is trained
    python scripts/reproduce.py theorems rows=theorem1 dim=10     # one of its measures, with a setting changed

    rows=<name,...>    these rows, lines or measures alone
    panels=<name,...>  these panels of a figure alone
    folds=<n,...>      these folds alone; their record is written only once all ten are run together
    jobs=<n>           runs at a time; several have one thread each
    gpus=<n>           every run under torchrun, with a process on each of n GPUs of this machine
    deadline=<s>       begin nothing after s seconds and tell what runs then to end; SIGTERM does the same at any time
    again              run what has a record, too
    list               say the cost, print the commands and run nothing

Everything else goes to train.py, or is a setting of a measure (those are in study.yaml); of an axis of a grid, as k=5
of fig3, it chooses points. Beside studies that train, those that measure know the scale alone. The command says first
what it will run, and what that costs by the records of runs of the same kind. What has a record in results/ is not
run; finished runs of runs/ are not trained again, interrupted ones resume. A run that was typed as model=, data= and
grad= counts as the row whose resolved config it has. Overrides that make it another experiment are in the name of the
record, which no page shows. The exit status is 1 where something failed, and 3 where it was stopped with something
left. `python scripts/report.py` renders the pages.

A run that is told to end exits at once, or where its trainer knows the signal with a checkpoint of its last step; it
resumes at its last checkpoint (those of evaluations, and every checkpoint_every=<n> steps). scale=cpu and scale=smoke
run as many at a time as there are cores. scale=smoke cuts batch, tokens and crop, and trains on generated data where
the real files are not at hand; scripts/running/rehearsal.py has the numbers. No page counts such a row as one of the
paper's budget.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

try:
    from phantom.engine.errors import UserError
    from phantom.engine.machine import streams
    from scripts import arguments, studies
    from scripts.running import process
    from scripts.running import study as running
    from scripts.running.process import Run, Work
    from scripts.running.stopping import Stop
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")

ALL = "all"
OWN = ("rows", "panels", "folds", "jobs", "gpus", "deadline")


class Part(NamedTuple):
    """Work of a study, and how many of its runs were asked for at a time."""

    study: str
    work: Work
    jobs: int | None


def main(items: Sequence[str]) -> None:
    """Run studies: their names first, then the items of this command, and overrides of train.py."""
    streams.prepare()
    try:
        _main(items)
    except studies.StudyError as error:
        arguments.fail(str(error))


def _main(items: Sequence[str]) -> None:
    known = [name for name in studies.names() if running.rows_of(studies.load(name))]
    named = [*takewhile(lambda item: item in (*known, ALL), items)]
    own, words, overrides = arguments.split(
        items[len(named) :] if named else [item for item in items if item.startswith("-")],
        doc=__doc__,
        own=OWN,
        words=("list", "again"),
    )
    if not named:
        name = items[0] if items else ""
        other = f"{name} is no study of training runs, results/README.md has its command; " * (name in studies.names())
        arguments.fail(f"{other}name a study first, one of {', '.join(known)}, or {ALL}")
    names = known if ALL in named else [*dict.fromkeys(named)]
    for key in ("rows", "panels", "folds"):
        if len(names) > 1 and key in own:
            arguments.fail(f"{key}={own[key]} belongs to one study: name it alone, or leave {key}= out")
    jobs, gpus = arguments.count(own, "jobs", None), arguments.count(own, "gpus", None)
    deadline = arguments.count(own, "deadline", None)
    if gpus is not None and jobs is not None:
        arguments.fail(f"gpus={gpus} takes all of them for one run after the other: leave jobs= out")
    stop, parts = Stop(deadline), []
    try:
        chosen = _studies(names, overrides)
        train = ALL in named or any("measures" not in study for study in chosen)
        for study in chosen:
            # beside studies that train those that measure do so on one thread, without a GPU, and know the scale alone
            takes = not train or "measures" not in study
            asked, on = (own, gpus) if takes else ({}, None)
            items = overrides if takes else [item for item in overrides if item.startswith("scale=")]
            found = running.works(study, asked, items, again="again" in words, gpus=on)
            parts += [Part(study["name"], work, jobs if takes else None) for work in found]
    except (RuntimeError, UserError) as error:
        arguments.fail(str(error))
    if not parts:
        print(f"nothing is missing in {', '.join(dict.fromkeys(named))}; `again` runs it once more", file=sys.stderr)
    for part in parts:
        of = f" of {part.study}" if len(names) > 1 else ""
        print(f"to run{of}: {len(part.work.runs)}. {part.work.cost}.", file=sys.stderr)
    if "list" in words:
        for run in (run for part in parts for run in part.work.runs):
            print(run.line())
        return
    _run(parts, stop, others_go_on=len(names) > 1)


def _studies(names: Sequence[str], overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Return the studies, of several those alone that have the scale; where none has it, all, which say so."""
    found = list(map(studies.load, names))
    scale = running.scale_of(overrides)
    without = [study for study in found if scale in ("gpu", "cpu") and scale not in running.scales_of(study)]
    if not without or len(without) == len(found):
        return found
    print(f"scale={scale} is no scale of {', '.join(study['name'] for study in without)}", file=sys.stderr)
    return [study for study in found if study not in without]


def _run(parts: Sequence[Part], stop: Stop, *, others_go_on: bool) -> None:
    """Run the parts, and say what failed and what is left."""
    failed = []
    left: list[Run] = []
    with stop.listening():
        for study, work, jobs in parts:
            try:
                left += process.execute(work, jobs, stop)
            except (RuntimeError, UserError, OSError) as error:
                if not others_go_on:
                    arguments.fail(str(error))
                print(f"error: {study}: {error}", file=sys.stderr, flush=True)
                failed.append(study)
    if left:
        never = " without resume=never" * any("resume=never" in run.overrides for run in left)
        print(f"left: {len(left)}, which the same command{never} runs or resumes:", file=sys.stderr)
        print(*(f"  {run.name}" for run in left), sep="\n", file=sys.stderr)
    if failed:
        arguments.fail(f"runs failed in {', '.join(dict.fromkeys(failed))}: see above; the others are done")
    if left:
        sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
