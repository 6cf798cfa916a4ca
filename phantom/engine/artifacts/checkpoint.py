"""Checkpoints: written whole or not at all, read without executing anything.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries, so that
`torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phantom.engine.errors import CheckpointError

# 2: one entry of random state and carries per rank; 3: averaged weights named as those of the model
FORMAT = 3


# exceptions that a corrupt checkpoint can raise in zipfile, pickle and torch
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, NotImplementedError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error),
)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(
        ".tmp"
    )  # always the same name, so that the next save overwrites the file of a killed run
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, of an older format, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: train first, or name an existing run folder")
    try:
        # torch.load does not look at the checksums in its files: a flipped bit would pass as another weight
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the checkpoint {path} is damaged and cannot be read ({reason}). Use the other one of last.pt and best.pt "
            "in that folder, or start from the beginning with resume=never"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, int):
        raise CheckpointError(
            f"{path} is not a checkpoint of this program. Official weights are read by evaluate.py official=<file>"
        )
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {found} of checkpoints, this version of the program reads format {FORMAT}: use the "
            "commit that the run's record names, or start from the beginning with resume=never"
        )
    return state


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load `weights` into `model`, strictly.

    Raises:
        CheckpointError: the checkpoint belongs to another model; lists what differs.
    """
    own = model.state_dict()
    problems = [f"missing here: {name}" for name in weights if name not in own]
    problems += [f"missing there: {name}" for name in own if name not in weights]
    problems += [
        f"{name}: shape {tuple(weights[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(
            f"the checkpoint {path} is of another model than {type(model).__name__} as built here: {shown}"
        )
    model.load_state_dict(weights)


def check_config(state: dict[str, Any], differences: Callable[[str], list[str]], path: Path) -> None:
    """Raise unless the run that wrote `state` had the same config, apart from where and how it runs.

    Args:
        differences: returns the root keys in which a saved config differs from that of this run.

    Raises:
        CheckpointError: names the root keys that differ.
    """
    changed = differences(state["config"])
    if changed:
        raise CheckpointError(
            f"the checkpoint {path} was written under another config (different: {', '.join(changed)}): "
            "resume with the same config, or start from the beginning with resume=never"
        )


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of torch's generators that a run draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
