"""Weights & Biases: the same rows as metrics.jsonl, as panels."""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.engine.artifacts import files
from phantom.engine.errors import first_line

MODES = ("auto", "online", "offline", "disabled")
LONGEST, LONGEST_TAG = 128, 64  # characters that wandb takes
VARIABLE = "WANDB_MODE"
VARIABLE_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # what wandb itself takes there
log = logging.getLogger(__name__)


class Tracker:
    """Send rows to wandb; a tracker that is disabled does nothing.

    Args:
        mode: one of `MODES`; "auto" logs online when the user is logged in and offline otherwise.
        group: of runs that belong together: the seeds of an experiment, or the jobs of a sweep.
        tags: words to find the run by.
        fresh: begin a curve of its own; otherwise continue that of the folder's last start.
    """

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        name: str,
        folder: Path,
        config: Mapping[str, Any],
        group: str | None = None,
        tags: Sequence[str] = (),
        fresh: bool = False,
    ) -> None:
        self._run: Any = None  # wandb is imported only where it is used
        if mode == "auto":
            mode = os.environ.get(VARIABLE) or ("online" if _logged_in() else "offline")
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            log.warning("wandb is not installed: metrics go to metrics.jsonl only (wandb=disabled says so silently)")
            return
        try:
            options = {
                "mode": mode,
                "project": project,
                "name": name,
                "group": None if group is None else group[:LONGEST],
                "job_type": "train",
                "tags": [tag[:LONGEST_TAG] for tag in tags],
                "id": _identifier(folder, fresh=fresh),
                "resume": "allow",
                "dir": str(folder),
                "config": dict(config),
                "settings": wandb.Settings(silent=True, init_timeout=30),
            }
            self._run = _begin(wandb, options)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # a folder that it may not write to, a setting that it does not know
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on without wandb, whose process may fail at any time: no reason not to train."""
        self._run = None
        reason = first_line(error)
        log.warning("wandb failed (%s: %s): metrics go to metrics.jsonl only", type(error).__name__, reason)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of `row`, grouped under its kind (and split) as `train/loss`, `test/accuracy`.

        An evaluation on the training split is `eval_train/...`: `train/...` are the numbers of training itself.
        """
        prefix = row.get("split", row["kind"])
        prefix = "eval_train" if row["kind"] == "eval" and prefix == "train" else prefix
        panels = {f"{prefix}/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        self._tell(lambda run: run.log({**panels, "step": row["step"]}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the final numbers and close."""
        self._tell(lambda run: run.summary.update(dict(summary)))
        self._tell(lambda run: run.finish())

    def abort(self) -> None:
        """Close a run that failed, so that the next one of a sweep does not continue its curve."""
        self._tell(lambda run: run.finish(exit_code=1))

    def _tell(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._give_up(error)


def _begin(wandb: Any, options: dict[str, Any]) -> Any:
    try:
        return wandb.init(**options)
    except wandb.errors.Error as error:  # no network, a wrong key
        log.warning("wandb cannot log %s (%s): logging offline, `wandb sync` uploads it later", options["mode"], error)
        wandb.teardown()  # the failed attempt still holds the run's id
        return wandb.init(**options | {"mode": "offline"})


def _logged_in() -> bool:
    """Return whether wandb would find a key, without asking the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _identifier(folder: Path, *, fresh: bool) -> str:
    """Return the id of the folder's curve, which outlives a restart and a move of the folder.

    Where the run begins anew, or the folder is a copy, it is a new one.
    """
    kept = folder / "wandb" / "id"
    if kept.parent.is_symlink():  # it came with the folder, and leads to a folder of something else
        raise OSError(f"{kept.parent} is a link: remove it")
    # early ones have no home; one that was cut short by a crash is empty
    identifier, home, *_ = [*_lines(kept), "", ""]
    original = Path(home) / "wandb" / "id"
    is_copy = home != "" and original.exists() and not original.samefile(kept)
    # not of a run that began there since
    is_copy = is_copy and _lines(original)[:1] == [identifier]
    if fresh or is_copy:
        identifier = secrets.token_hex(6)
    identifier = identifier or hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    files.write(kept, f"{identifier}\n{folder}\n".encode())
    return identifier


def _lines(path: Path) -> list[str]:
    try:
        return files.read(path).decode().splitlines()
    except FileNotFoundError:
        return []
