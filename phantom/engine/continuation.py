"""A run that goes on from the end, or the middle, of another one: the same config but for its budget.

The new run has a folder of its own, into which the checkpoints and rows of the old one are copied; from there it is
resumed as any run is. Weights, momenta, carries and random states are those of the old run at its last checkpoint. The
schedule follows the new budget from there on: with a constant rate, one epoch and then a second one are two epochs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from phantom.engine.artifacts import checkpoint, files
from phantom.engine.errors import ConfigError
from phantom.engine.plan import Plan

FILES = ("metrics.jsonl", "best.pt", "last.pt")  # the last one makes the copy whole


def check_continued(plan: Plan) -> dict[str, Any] | None:
    """Return facts about the run that `plan` continues, for the record; None where it continues none.

    Raises:
        ConfigError: the folder holds no run; see `check_budget` for the rest.
        CheckpointError: its checkpoint is damaged, or of a config that differs in more than the budget.
    """
    if plan.config["continue_from"] is None:
        return None
    folder = _folder(plan)
    if not (folder / "last.pt").is_file():
        raise ConfigError(
            f"continue_from={plan.config['continue_from']}: {folder} holds no last.pt: name the folder of a run, such "
            "as that at the end of its closing table"
        )
    state = checkpoint.load(folder / "last.pt")
    checkpoint.check_config(state, plan.differences_to_resume, folder / "last.pt")
    return {"continue_from": plan.config["continue_from"], "step": state["step"]}


def check_budget(origin: dict[str, Any] | None, total: int) -> None:
    """Raise where a run of `total` steps has nothing to add to the one that it continues.

    Raises:
        ConfigError: that one has taken as many.
    """
    if origin is not None and "continue_from" in origin and total <= origin["step"]:
        raise ConfigError(
            f"the budget of {total} steps ends before it begins: continue_from={origin['continue_from']} stands at "
            f"step {origin['step']}; use more epochs, and more steps where steps= is set"
        )


def copy_continued(plan: Plan) -> None:
    """Copy what the continued run has left into the folder of the new one; `last.pt` comes last, and at once."""
    for name in FILES:
        source = _folder(plan) / name
        if source.is_file():
            with files.whole(plan.folder / name, parents=False) as copy, open(source, "rb") as original:
                shutil.copyfileobj(original, copy)


def _folder(plan: Plan) -> Path:
    return Path(plan.config["continue_from"]).expanduser().absolute()
