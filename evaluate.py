"""Evaluate a trained run, or an official checkpoint.

    python evaluate.py run=runs/mdeq_tiny-digits-upg/default/seed0                       # the run's own number
    python evaluate.py run=<folder> checkpoint=best split=test eval_solver.max_steps=40   # another solver budget
    python evaluate.py run=<folder> data.root=/data/cifar10                               # the data moved
    python evaluate.py run=<folder> eval_solver.max_steps=5,10,20 model.eval_mem_len=0,64 # every combination
    python evaluate.py official=<file.pth> source=phantom_grad model=mdeq_large data=cifar10

Further items of the form key=value change the run's config; with `official` they compose a config as for train.py.
Prints the metrics, and the cost of the solves, as JSON; of several combinations a list, each with its overrides.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from phantom.engine import cli
from phantom.engine.evaluate_run import evaluate_official, evaluate_run


def main(arguments: list[str]) -> None:
    """Parse key=value items and print the metrics."""
    if not arguments or any(item in ("-h", "--help") for item in arguments):
        sys.exit(__doc__)
    bad = [item for item in arguments if "=" not in item]
    if bad:
        sys.exit(f"error: {bad[0]!r} is not of the form key=value\n{__doc__}")
    own = {"run", "official", "source", "checkpoint", "split"}
    named = {key: value for key, value in (item.split("=", 1) for item in arguments) if key in own}
    try:
        jobs = cli.expand([item for item in arguments if item.split("=", 1)[0] not in own])
        found = [{**({"overrides": job} if len(jobs) > 1 else {}), **evaluate_one(named, job)} for job in jobs]
    except Exception as error:
        if not cli.is_user_error(error):
            raise
        sys.exit(f"error: {error}")
    print(json.dumps(found if len(jobs) > 1 else found[0], indent=2))


def evaluate_one(named: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Return the metrics of what `named` names, with one set of overrides.

    Raises:
        ConfigError: nothing is named, or an official checkpoint without its code base.
    """
    if "official" in named:
        if "source" not in named:
            raise cli.build.ConfigError("official=<file> needs source=<code base>, such as source=phantom_grad")
        return evaluate_official(
            Path(named["official"]), source=named["source"], split=named.get("split"), overrides=overrides
        )
    if "run" in named:
        which = named.get("checkpoint", "last")
        return evaluate_run(Path(named["run"]), which=which, split=named.get("split"), overrides=overrides)
    raise cli.build.ConfigError("name what to evaluate: run=<folder>, or official=<file> source=<code base>")


if __name__ == "__main__":
    main(sys.argv[1:])
