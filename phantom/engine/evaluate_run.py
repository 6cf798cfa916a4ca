"""Rebuild a run from its folder and evaluate it; or evaluate official weights under a composed config."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from phantom.engine import build, checkpoint, cli, distributed, precision
from phantom.engine.evaluation import evaluate


def evaluate_run(folder: Path, *, which: str, split: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a run's `last` or `best` checkpoint; without overrides, exactly the run's own numbers.

    Args:
        folder: the run folder.
        split: the split to evaluate; None takes the first of the run's `eval_splits`.
        overrides: key=value items that change the run's config, such as `eval_solver.max_steps=40`. An `eval_solver`
            that the run does not have starts as a copy of its solver.

    Raises:
        CheckpointError: the folder or its checkpoint is missing, damaged, or of another model.
        ConfigError: an override names an unknown key.
    """
    if which not in ("last", "best"):
        raise build.ConfigError(f"checkpoint={which!r} is not known; choose one of last, best")
    if not folder.is_dir():
        raise checkpoint.CheckpointError(f"there is no run folder {folder}: train first, or correct run=")
    path = folder / f"{which}.pt"
    state = checkpoint.load(path)
    config = cli.change(yaml.safe_load(state["config"]), overrides)
    weights = state["model"]
    if state["ema"] is not None:
        averaged = "module."
        weights = {name.removeprefix(averaged): w for name, w in state["ema"].items() if name.startswith(averaged)}
    return _evaluate(
        config, split, lambda model: checkpoint.load_weights(model, weights, path), {"step": state["step"]}
    )


def evaluate_official(path: Path, *, source: str, split: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of an official checkpoint, loaded by its own names.

    Raises:
        CheckpointError: the file is missing, or does not hold tensors alone.
        ConfigError: the config does not compose, or the checkpoint is of another model or code base.
    """
    config, _ = cli.compose(overrides)
    if not path.is_file():
        raise checkpoint.CheckpointError(f"there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise checkpoint.CheckpointError(f"{path} cannot be read as tensors alone: {reason}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break

    def load(model: nn.Module) -> None:
        try:
            build.load_reference(model, state, source)
        except (ValueError, TypeError) as error:
            raise build.ConfigError(f"{path}: {error}") from error

    return _evaluate(config, split, load, {"source": source})


def _evaluate(config: dict[str, Any], split: str | None, load: Any, facts: dict[str, Any]) -> dict[str, Any]:
    kind = build.check_pair(config)
    precision.set_up(config["precision"], deterministic=config["deterministic"])
    device, rank, world = distributed.start(config["device"])
    source = build.build_source(config)
    split = split or config["eval_splits"][0]
    if split not in source.splits:
        raise build.ConfigError(f"split={split!r} does not exist; the data has {', '.join(source.splits)}")
    model = build.build_model(config, source.spec, build.build_deq(config)).to(device)
    load(model)
    shard = build.Shard(rank=rank, world=world)
    metrics = evaluate(
        model, build.build_task(kind), source, split, shard=shard, device=device, precision=config["precision"]
    )
    return {"split": split, **facts, **metrics}
