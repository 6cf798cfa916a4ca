"""Evaluate a trained run, weights that ship with the code, or an official checkpoint.

    python evaluate.py run=runs/mdeq_tiny-digits-upg/default/seed0                       # the run's own number
    python evaluate.py run=<folder> checkpoint=best split=test eval_solver.max_steps=40   # another solver budget
    python evaluate.py run=<folder> checkpoint=last-1                                     # the one before the last
    python evaluate.py run=<folder> data.root=/data/cifar10                               # the data moved
    python evaluate.py run=<folder> trust=mine,datasets                                   # what they define is admitted
    python evaluate.py run=<folder> eval_solver.max_steps=5,10,20 model.eval_mem_len=0,64 # every combination
    python evaluate.py weights=reasoner_sudoku4                                           # of weights/, or a folder
    python evaluate.py official=<file.pth> source=phantom_grad model=mdeq_large data=cifar10

A run folder builds classes of this project alone, whatever its config says, and so do weights; `trust` adds what
packages of yours define.
Further items of the form key=value change the saved config; with `official` they compose a config as for train.py.
Prints the metrics, and the cost of the solves, as JSON; of several combinations a list, each with its overrides.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from models.official.load import load_reference
from phantom.engine import command
from phantom.engine.artifacts.records import to_json
from phantom.engine.config.overrides import expand
from phantom.engine.errors import ConfigError
from phantom.engine.machine import distributed, launcher, signals, streams
from phantom.engine.rebuild import evaluate_rebuilt, load_shipped, rebuild_official, rebuild_run, rebuild_shipped
from train import CONFIGS

WEIGHTS = Path(__file__).resolve().parent / "weights"
# arguments that are not config overrides, for each thing that can be evaluated
OWN = {"run": ("checkpoint", "split", "trust"), "weights": ("split", "trust"), "official": ("source", "split")}


def main(arguments: list[str]) -> None:
    """Parse key=value items and print the metrics."""
    streams.prepare()
    if any(item in ("-h", "--help") for item in arguments):
        print(__doc__)
        return
    try:
        with signals.end_at_once():
            named, overrides = split_arguments(arguments)
            jobs = expand(overrides)
            found = [{**({"overrides": job} if len(jobs) > 1 else {}), **evaluate_one(named, job)} for job in jobs]
    except Exception as error:
        if not command.is_user_error(error):
            raise
        command.refuse(error)
    if launcher.rank() == 0:
        print(to_json(found if len(jobs) > 1 else found[0], indent=2))
        streams.check_result()


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return what names the weights, and the overrides of the config.

    Raises:
        ConfigError: an item is not of the form key=value, or nothing, or two things, are named.
    """
    bad = [item for item in arguments if "=" not in item]
    if bad:
        raise ConfigError(f"{bad[0]!r} is not of the form key=value; see python evaluate.py --help")
    pairs = [item.split("=", 1) for item in arguments]
    own = {*OWN, *(key for keys in OWN.values() for key in keys)}
    twice = [key for key, count in Counter(key for key, _ in pairs if key in own).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice: leave one out")
    named = {key: value for key, value in pairs if key in own}
    whats = [key for key in OWN if key in named]
    if len(whats) != 1:
        raise ConfigError(
            "name one thing to evaluate: run=<folder>, weights=<name>, or official=<file> source=<code base>"
        )
    unused = [key for key in named if key not in (whats[0], *OWN[whats[0]])]
    if unused:
        raise ConfigError(f"{unused[0]}={named[unused[0]]} does not go with {whats[0]}=; leave it out")
    if "official" in named and "source" not in named:
        raise ConfigError("official=<file> needs source=<code base>, such as source=phantom_grad")
    return named, ["=".join(pair) for pair in pairs if pair[0] not in own]


def evaluate_one(named: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Return the metrics of what `named` names, with one set of overrides."""
    trust = named.get("trust")
    if "official" in named:
        path, source = Path(named["official"]), named["source"]
        rebuilt = rebuild_official(
            path, source=source, overrides=overrides, configs=CONFIGS, load_reference=load_reference
        )
    elif "weights" in named:
        rebuilt = rebuild_shipped(shipped_folder(named["weights"]), overrides=overrides, configs=CONFIGS, trust=trust)
    else:
        which = named.get("checkpoint", "last")
        rebuilt = rebuild_run(Path(named["run"]), which=which, overrides=overrides, configs=CONFIGS, trust=trust)
    return evaluate_rebuilt(rebuilt, named.get("split"))


def pretrained(name: str, *overrides: str) -> nn.Module:
    """Return the model of weights that ship, for evaluation, on the CPU; no data is read.

    Args:
        name: a folder of `weights/`, or the path of one from elsewhere, such as the hub.
        overrides: key=value items that change its config, such as `eval_solver.max_steps=40`.

    Raises:
        ConfigError: there are no weights of this name, or an override does not fit.
        CheckpointError: they are damaged.
    """
    return load_shipped(shipped_folder(name), overrides=overrides, configs=CONFIGS)


def shipped_names() -> list[str]:
    """Return the names of the weights that ship with the code."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/record.json"))


def shipped_folder(name: str) -> Path:
    """Return the folder of the weights `name`, which may also be the path of a folder.

    Raises:
        ConfigError: there is neither; lists the names.
    """
    if name in shipped_names():
        return WEIGHTS / name
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        raise ConfigError(
            f"weights={name} is not known: choose one of {', '.join(shipped_names())}, or name a folder of weights"
        )
    return folder.resolve()


if __name__ == "__main__":
    main(sys.argv[1:])
    distributed.stop()
