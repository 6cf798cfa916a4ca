"""Where and when a run ran: the machine, the libraries and the commit, as its record names them."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[3]  # of the code that runs
# what a hook or a tool may have set: git looks there, and not where it is started
OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
LIBRARIES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "torch_geometric", "numpy")


def now() -> str:
    """Return the current UTC time in ISO format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of the CPU and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, Any]:
    """Return the circumstances of a run: device, versions, commit."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    commit, status = None, None
    if _is_of_git():
        commit = _git("rev-parse", "HEAD")
        # a record that is written again leaves the code as it is: results/ does not count as a change
        status = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
    # code that runs without its repository, as in a container, can be told its commit
    commit = commit or os.environ.get("PHANTOM_COMMIT")
    if commit is None:
        log.warning("the record names no commit: git knows none of %s, and PHANTOM_COMMIT is not set", ROOT)
    return {
        "device": device_name(device),
        "versions": versions,
        "commit": commit,
        "dirty": None if status is None else bool(status),
    }


def _is_of_git() -> bool:
    """Return whether this code is a repository's own: one in which it merely lies has commits of something else."""
    top = _git("rev-parse", "--show-toplevel")
    return top is not None and Path(top).resolve() == ROOT


def _git(*arguments: str) -> str | None:
    # a tree of another user, as on a mounted volume, is refused without safe.directory
    environment = {key: value for key, value in os.environ.items() if key not in OTHER_REPOSITORY}
    line = ["git", "-c", "safe.directory=*", *arguments]
    try:
        result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
