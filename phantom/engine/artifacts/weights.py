"""Weights to begin a run with: a checkpoint of this program, named tensors, or the weights of another code base."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phantom.engine.artifacts import checkpoint
from phantom.engine.errors import CheckpointError, ConfigError, as_config_error, first_line

LoadReference = Callable[[nn.Module, dict[str, Any], str], None]
SAFETENSORS = ".safetensors"


def locate_weights(init: str) -> tuple[Path, str | None]:
    """Return the file that `init` names, and the code base whose names it has, as in `phantom_grad:mdeq.pth`.

    Raises:
        ConfigError: there is no such file.
    """
    source, _, rest = init.partition(":")
    named = bool(rest) and re.fullmatch(r"\w+", source) is not None and not Path(init).exists()
    path = Path(rest if named else init).expanduser()
    if path.is_dir():
        raise ConfigError(f"init={init} is a folder: name one of its files, such as {path / 'best.pt'}")
    if not path.is_file():
        raise ConfigError(
            f"init={init}: there is no file {path}. Name a checkpoint of this program, a {SAFETENSORS} file of its "
            "names, or official weights as <code base>:<file>"
        )
    return path, source if named else None


def load_initial(model: nn.Module, init: str, load_reference: LoadReference | None) -> dict[str, Any]:
    """Load the weights that `init` names into `model`, strictly; return facts about them for the record.

    Of a checkpoint with a moving average of the weights it is the average, as in evaluation.

    Args:
        load_reference: called as `load_reference(model, state, source)`; translates the names of a code base.

    Raises:
        ConfigError, CheckpointError: the file is missing, damaged, or of another model.
    """
    path, source = locate_weights(init)
    facts: dict[str, Any] = {"init": init, "digest": digest(path)}
    state = read_tensors(path)
    if source is not None:
        if load_reference is None:
            raise ConfigError(f"init={init}: this program knows no names of other code bases")
        with as_config_error(TypeError, prefix=f"init={init}: "):
            load_reference(model, state, source)
    elif "format" in state:
        whole = checkpoint.load(path)
        checkpoint.load_weights(model, whole["model"] if whole["ema"] is None else whole["ema"], path)
        facts["step"] = whole["step"]
    else:
        checkpoint.load_weights(model, state, path)
    return facts


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the content of a file of tensors by name; code inside it is not run.

    Raises:
        CheckpointError: the file is missing, or does not hold tensors alone.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        if path.suffix == SAFETENSORS:
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors") from error
    except Exception as error:  # also safetensors' own class, which is known only where it is installed
        if not isinstance(error, checkpoint.UNREADABLE) and path.suffix != SAFETENSORS:
            raise
        reason = first_line(error)
        raise CheckpointError(f"{path} cannot be read as tensors alone: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    for key in ("state_dict", "model_state_dict", "model"):
        if "format" not in state and isinstance(state.get(key), dict):
            return state[key]
    return state


def digest(path: Path) -> str:
    """Return a short hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
