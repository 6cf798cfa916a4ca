"""Make the dashboards of a project on Weights & Biases, and send the committed records there.

    python scripts/dashboard.py                                 # the workspace and the report of the project phantom
    python scripts/dashboard.py project=mine metric=perplexity split=valid
    python scripts/dashboard.py export                          # every committed record of a training as a run
    python scripts/dashboard.py export mode=offline             # as files, for `wandb sync`

    project=phantom     of the runs (train.py: wandb_project=)
    entity=<name>       user or team (default: that of who is logged in)
    metric=accuracy     headline metric
    split=test          that it is measured on
    mode=online         of the export: online or offline

The workspace and the report have accuracy against steps and time, by k and lam, the times of a step by phase, the
speed-up over implicit differentiation, residual, solver steps, spectral radius, cosine and memory. The runs of a sweep
are one group. The dashboards need `pip install -e ".[dashboard]"`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

try:
    from scripts import arguments, studies
    from scripts.running import export
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: `bash scripts/setup.sh` and .venv/bin/python, or pip install -e . -r requirements.txt")


def main(items: Sequence[str]) -> None:
    """Make workspace and report, or export the records."""
    own, words, others = arguments.split(
        items, doc=__doc__, own=("project", "entity", "metric", "split", "mode"), words=("export",)
    )
    if others:
        arguments.fail(f"{others[0]} is not known; see --help")
    mode = arguments.choice(own, "mode", ("online", "offline"), "online")
    project = own.get("project", "phantom")
    try:
        import wandb
    except ModuleNotFoundError:
        arguments.fail("wandb is not installed: pip install wandb")
    try:
        if words:
            if asked := [key for key in ("metric", "split") if key in own]:
                arguments.fail(f"{asked[0]}= is that of the dashboards; export sends records with all their metrics")
            count = export.send(wandb, project=project, entity=own.get("entity"), mode=mode, say=print)
            print(
                f"{count} records are in {project}"
                if mode == "online"
                else f"{count} records: wandb sync wandb/offline-*"
            )
            return
        if "mode" in own:
            arguments.fail("mode= is that of `export`; the dashboards are made online")
        _make(wandb, own, project)
    except studies.StudyError as error:
        arguments.fail(str(error))
    except wandb.errors.Error as error:
        arguments.fail(f"wandb: {error}; log in with `wandb login`")


def _make(wandb: Any, own: dict[str, str], project: str) -> None:
    try:
        from scripts.reporting import dashboard
    except ModuleNotFoundError as error:
        arguments.fail(f'{error}: the dashboards need pip install -e ".[dashboard]"')
    entity = own.get("entity") or wandb.Api().default_entity
    if not entity:
        arguments.fail("name a user or team with entity=<name>, or log in with `wandb login`")
    target = dashboard.Target(entity, project, own.get("metric", "accuracy"), own.get("split", "test"))
    dashboard.save(target, print)


if __name__ == "__main__":
    main(sys.argv[1:])
