"""The final record.json of a run, which says what ran where and what came of it, and its JSON."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phantom.engine.artifacts import files

log = logging.getLogger(__name__)


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
    if isinstance(node, np.generic):
        node = node.item()
    return None if isinstance(node, float) and not math.isfinite(node) else node


def write_json(path: Path, content: Mapping[str, Any], *, indent: int = 2) -> None:
    """Write `content` to `path` atomically, readable by a person."""
    files.write(path, (to_json(content, indent=indent) + "\n").encode())


def read(folder: Path) -> tuple[dict[str, Any], str] | None:
    """Return the record of a run folder and its config as text; None where there is none that is whole."""
    try:
        record = json.loads(files.read(folder / "record.json"))
        config = files.read(folder / "config.yaml").decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:  # cut short by a crash, or not UTF-8
        log.warning("the record in %s is damaged and does not count (%s)", folder, error)
        return None
    whole = isinstance(record, dict) and {"seed", "final", "best"} <= record.keys()
    return (record, config) if whole else None
