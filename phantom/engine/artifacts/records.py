"""The folder of a run, its hash, and the final record.json that says what ran where."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from phantom.engine.artifacts import files

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[3]  # of the code that runs
# what a hook or a tool may have set: git looks there, and not where it is started
OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")

# Keys that say where or how to run, not what to train: they change neither a run's folder nor, beyond rounding, its
# results.
CIRCUMSTANCES = (
    *("seed", "device", "speed", "compile", "cuda_graph", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("runs", "resume", "progress", "on_failure", "wandb", "wandb_project"),
    *("data.root", "data.download", "data.cache", "data.workers"),
)
# keys that came later: a run that does not use them is the run that it was before
LATER = ("init", "continue_from", "target")
# keys that may change where a run goes on from another one, see `continue_from`
BUDGET = ("epochs", "steps", "smoke_steps", "schedule", "eval_every", "eval_splits", "scale", "repeats", *LATER)
LIBRARIES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "torch_geometric", "numpy")


def run_folder(root: Path | str, label: str, overrides: Sequence[str], seed: int) -> Path:
    """Return the folder of a run: a pure function of the experiment, the overrides and the seed.

    Args:
        root: folder of all runs.
        label: the experiment's name, or model-data-gradient for a run without one.
        overrides: the command line's `key=value` items.
    """
    kept = [item for item in meaningful(overrides) if item.split("=")[0] not in ("experiment", "scale")]
    slug = ",".join(re.sub(r"[^\w=.,+-]+", "-", item) for item in kept) or "default"
    # too long, or with characters that a folder's name may not have
    if len(slug) > 80 or slug not in ("default", ",".join(kept)):
        slug = f"{slug[:64]}-{hashlib.sha256(','.join(kept).encode()).hexdigest()[:10]}"
    return Path(root) / label / slug / f"seed{seed}"


def meaningful(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that change the result of a run, sorted."""
    return sorted(item for item in overrides if item.lstrip("+~").split("=")[0] not in CIRCUMSTANCES)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a finished run leaves in record.json, in this order.

    Args:
        label: the experiment's name, or model-data-gradient.
        recipe: that of the pair of model and data; None where no recipe was used, or existed yet.
        choices: the chosen leaf of every group.
        overrides: the items of the command line that change the result.
        metric: the headline metric; `baseline` holds, per split, its value for a model that ignores its input.
        data_digests: per split, a short hash of the examples that were read.
        data_notes: what the data set says of its splits.
        origin: where the run began, if not with drawn weights: `init` or `continue_from`, with a digest or step.
        parameter_groups: number of parameters of every part of the model.
        official_parameter_count: where the original counts otherwise, such as a shared weight twice; else None.
        folder: the run folder, relative to the folder of all runs.
        dirty: whether the code differed from `commit`; None where that is not known.
        wall_seconds: of training and evaluations, summed over restarts; training_seconds: without evaluations and the
            checkpoints that they and `checkpoint_every` write, and with the time to compile.
        target: the value of the headline metric at which the run was to stop, or None; `reached`: whether it did.
        final, best: metrics per split at the last evaluation, and at the one where the first split was best.
        train: the last training row; `times`: seconds by phase; `items_per_second`: in step time, of `unit`.
        peak_memory: of this job, in bytes: allocated on a GPU, or resident for the process on a CPU.
    """

    label: str
    experiment: str | None
    recipe: str | None = None
    choices: dict[str, Any]
    overrides: list[str]
    scale: str
    seed: int
    config_hash: str
    kind: str
    metric: str
    baseline: dict[str, float]
    data_digests: dict[str, str]
    data_notes: dict[str, str | int]
    origin: dict[str, Any] | None = None
    num_parameters: int
    parameter_groups: dict[str, int]
    official_parameter_count: int | None
    world_size: int
    precision: str
    gradient_precision: str | None
    compile: bool
    cuda_graph: bool
    folder: str
    device: str
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    started: str
    finished: str
    wall_seconds: float
    training_seconds: float | None = None
    steps: int
    target: float | None = None
    reached: bool | None = None
    final: dict[str, dict[str, float]]
    best: dict[str, dict[str, float]]
    train: dict[str, float]
    times: dict[str, dict[str, float]]
    items_per_second: float | None
    unit: str
    peak_memory: int


def to_json(content: Any, *, indent: int | None = None) -> str:
    """Return `content` as JSON, which has no NaN and no infinity: a number that is not finite becomes null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` atomically, readable by a person."""
    text = to_json(content, indent=2) + "\n"
    with files.whole(path) as file:
        file.write(text.encode())


def read(folder: Path) -> tuple[dict[str, Any], str] | None:
    """Return the record of a run folder and its config as text; None where there is none that is whole."""
    try:
        record = json.loads((folder / "record.json").read_bytes())
        config = (folder / "config.yaml").read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # cut short by a crash, or not UTF-8
        log.warning("the record in %s is damaged and does not count (%s)", folder, error)
        return None
    whole = isinstance(record, dict) and {"seed", "final", "best"} <= record.keys()
    return (record, config) if whole else None


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a short hash of what was run: the resolved config without the keys that only say where or how."""
    return hashlib.sha256(json.dumps(_what(config), sort_keys=True).encode()).hexdigest()[:16]


def differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the root keys in which two configs differ, those that only say where or how left out."""
    a, b = _what(config), _what(other)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _what(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in CIRCUMSTANCES or key == "seed"}
    kept = {key: value for key, value in kept.items() if key not in LATER or value is not None}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {key: value for key, value in kept["data"].items() if f"data.{key}" not in CIRCUMSTANCES}
    return _without(kept, "compile")  # solvers have the key, too


def _without(node: Any, name: str) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without(value, name) for key, value in node.items() if key != name}


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
