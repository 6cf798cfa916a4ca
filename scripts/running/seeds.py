"""The rows of a table, each with its seeds: a record per run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phantom.engine.artifacts import records
from phantom.engine.errors import ConfigError
from scripts import studies
from scripts.running.process import Run, Work, folder_of, plan, typed_by_groups, variant_of


def work(experiments: Sequence[str], overrides: Sequence[str]) -> Work:
    """Return the runs of some experiments, seeds 0 to repeats - 1.

    `repeats` is read from the config here; train.py has no use for it.

    Raises:
        ConfigError: the overrides do not compose, or set the seed.
    """
    if any(item.startswith("seed=") for item in overrides):
        raise ConfigError("seed is set by this script, from 0 to repeats - 1; use train.py for another one")
    runs = []
    for experiment in experiments:
        config, label = plan([f"experiment={experiment}", *overrides])
        items = [f"experiment={experiment}", *(item for item in overrides if not item.startswith("repeats="))]
        kept = studies.results() / f"{label}{variant_of(items)}"
        for seed in range(config["repeats"]):
            folder = folder_of(config, label, items, seed)
            runs.append(Run(f"{label}, seed {seed}", [*items, f"seed={seed}"], folder, kept / f"seed{seed}.json"))
    return Work(runs, _keep, find=typed_by_groups)


def _keep(run: Run, record: dict[str, Any]) -> None:
    records.write_json(run.kept, record)
