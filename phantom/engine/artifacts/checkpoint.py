"""Checkpoints: written whole or not at all, read without executing anything.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries, so that
`torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from phantom.engine.artifacts import files
from phantom.engine.errors import CheckpointError, first_line

# 2: one entry of random state and carries per rank; 3: averaged weights named as those of the model
FORMAT = 3
LAST = "last.pt"
# the bit of a zip entry's attributes that marks a folder
FOLDER = 0x10
# every one of these can be read; of other types, torch is asked
LEAVES = (torch.Tensor, nn.Parameter, bool, int, float, str, type(None))
log = logging.getLogger(__name__)

# exceptions that a corrupt checkpoint can raise in zipfile, pickle and torch
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, NotImplementedError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error),
)


class DamagedError(CheckpointError):
    """A checkpoint that is missing or cannot be read; an older one may do."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically: a reader sees the old file or the new one, never half of one.

    The folder must exist. Numbers of numpy are written as Python's, and its arrays as tensors.

    Raises:
        CheckpointError: `state` holds what `load` could not read; nothing is written.
    """
    readable = _readable({"format": FORMAT, **state}, path, ())
    with files.whole(path, parents=False) as file:  # a folder that was removed stays removed
        torch.save(readable, file)


def save_last(folder: Path, state: dict[str, Any], count: int) -> None:
    """Write `state` to last.pt, of which the newest `count` stay: last.pt itself, last-1.pt and so on."""
    shift(folder, count)
    save(folder / LAST, state)
    trim(folder, count)


def check(state: dict[str, Any], path: Path) -> None:
    """Check that `save` could write `state` to `path`, so that nothing is lost when it comes to that.

    Raises:
        CheckpointError: names what it could not.
    """
    _readable(state, path, ())


def _readable(node: Any, path: Path, place: tuple[Any, ...]) -> Any:
    """Return `node`, which is at the keys `place` of the state, with what numpy made as plain values."""
    node = _plain(node)
    kind = type(node)
    if kind in LEAVES:
        return node
    if kind in (list, tuple):
        return kind(_readable(item, path, (*place, i)) for i, item in enumerate(node))
    if kind in (dict, OrderedDict):
        items = [(_readable(key, path, place), _readable(item, path, (*place, key))) for key, item in node.items()]
        found = copy.copy(node)  # a state_dict has attributes of its own
        found.clear()
        found.update(items)
        return found
    try:
        file = io.BytesIO()
        torch.save(node, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises what it likes
        raise CheckpointError(
            f"{path} cannot be written: {'.'.join(map(str, place))} is a {kind.__module__}.{kind.__qualname__}, and a "
            "checkpoint holds tensors, numbers, strings, lists and dictionaries. Give it as one of these"
        ) from error
    return node


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is np.ndarray:  # a masked array would lose its mask
        with contextlib.suppress(TypeError, ValueError):  # of text, of objects
            return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    return value


def shift(folder: Path, count: int) -> None:
    """Make room for a new last.pt: the one there stays as last-1.pt, that one as last-2.pt.

    last.pt itself stays until `save` replaces it, and is last-1.pt as well meanwhile. So the oldest of `count` files
    stays as one more until `trim`: a run that is killed between the two has as many checkpoints as before. The next one
    finds last.pt kept already, and moves nothing.
    """
    last, before = folder / LAST, _older(folder, 1)
    if count == 1 or not last.exists() or (before.exists() and last.samefile(before)):
        return
    for number in range(count, 1, -1):
        if _older(folder, number - 1).exists():
            os.replace(_older(folder, number - 1), _older(folder, number))
    before.unlink(missing_ok=True)
    try:
        os.link(last, before)
    except OSError:  # a file system without hard links
        os.replace(last, before)


def trim(folder: Path, count: int) -> None:
    """Remove what `shift` keeps beyond `count` files, once `save` has replaced last.pt."""
    if count > 1:
        _older(folder, count).unlink(missing_ok=True)


def _older(folder: Path, number: int) -> Path:
    return folder / f"last-{number}.pt"


def newest(folder: Path) -> str | None:
    """Return the name of the checkpoint that a run goes on from, or None where there is none.

    That is last.pt. Where it is missing or damaged, it is the intact one of the latest step, and the log says so; a
    damaged last.pt is kept as last.damaged.

    Raises:
        CheckpointError: there are checkpoints, but none that is intact; nothing is changed.
    """
    others = sorted(path.name for path in (*folder.glob("last-*.pt"), *folder.glob("best.pt")))
    if not others and not (folder / LAST).exists():
        return None
    try:
        load(folder / LAST)
    except DamagedError as error:
        problem = error
    else:
        return LAST
    steps = {}
    for name in others:
        with contextlib.suppress(DamagedError):
            steps[name] = load(folder / name)["step"]
    if not steps:
        raise CheckpointError(f"{problem}. Of {', '.join(others) or 'any other'}, none is intact either") from problem
    name = max(steps, key=steps.__getitem__)
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / "last.damaged")
        log.warning("%s. It is kept as last.damaged", problem)
    else:
        log.warning("%s is missing", folder / LAST)
    log.warning("the newest intact checkpoint is %s, of step %d: going on from there", name, steps[name])
    return name


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        DamagedError: the file is missing or damaged.
        CheckpointError: it is of an older format, or not one of ours.
    """
    if not path.is_file():
        raise DamagedError(f"there is no checkpoint {path}: train first, or name an existing run folder")
    try:
        # torch.load does not look at the checksums in its files: a flipped bit would pass as another weight
        with zipfile.ZipFile(path) as archive:
            # nor does it read an entry that is marked as a folder: it hands out memory as it finds it
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & FOLDER]
            broken = archive.testzip() or next(iter(folders), None)
        if broken is not None:
            raise zipfile.BadZipFile(f"wrong checksum or kind of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = first_line(error)
        raise DamagedError(
            f"the checkpoint {path} is damaged and cannot be read ({reason}). The command of its run goes on from the "
            "newest intact one of that folder (last.pt, last-1.pt), or from the beginning with resume=never; "
            "evaluate.py and explore.py take checkpoint=best, too"
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
            "resume with the same config, or start from the beginning with resume=never. A run that continues another "
            "one may change its budget alone; init=<folder>/last.pt begins with its weights under any config"
        )


def beginning_of(
    state: dict[str, Any], config: str, origin: dict[str, Any] | None
) -> tuple[bool, dict[str, Any] | None]:
    """Return whether the run of `config` wrote the checkpoint itself, and where it began.

    A run that continues another one begins with a copy of that one's checkpoint, which knows that one's beginning.

    Args:
        origin: what was found out before, for a checkpoint that does not know.
    """
    own, theirs = ((yaml.safe_load(text) or {}).get("continue_from") for text in (config, state["config"]))
    if own != theirs:
        return False, {"continue_from": own, "step": state["step"]}
    return True, state.get("origin") or origin


def command_to_go_on(config: str) -> str:
    """Return the words for the command that goes on from a checkpoint of `config`: resume=never would remove it."""
    never = (yaml.safe_load(config) or {}).get("resume") == "never"
    return "the same command without resume=never" if never else "the same command"


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
